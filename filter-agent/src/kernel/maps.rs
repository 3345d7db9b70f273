//! The maps: opening, reading and writing them.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv6Addr},
    thread,
};

use anyhow::{Context as _, Error, Result};
use aya::{
    Ebpf,
    maps::{Array, HashMap, LpmTrie, Map, MapData, MapError, PerCpuArray, RingBuf, lpm_trie::Key},
};
use filter_common::{
    Address, Answer, BloomLine, Engine, Existing, Guard, LocalKey, MAX_LOCALS, Name, Port,
    RuleValue, Section, mapped,
};
use ipnet::IpNet;

use crate::{
    clock::BootTime,
    kernel::{
        answer::answer,
        batch::{BATCH, Batches},
        change::Change,
        steps::Step,
        tries::{Tries, absent_is_none},
    },
};

/// Writes that are worth a second thread.
const MANY: usize = 2 * BATCH;

pub(super) struct Maps {
    pub(super) ports: Array<MapData, Port>,
    pub(super) locals: HashMap<MapData, LocalKey, Guard>,
    pub(super) protocols: Array<MapData, u32>,
    pub(super) allowed: Tries,
    pub(super) blocked: Tries,
    ends: Array<MapData, u64>,
    bloom: Array<MapData, BloomLine>,
    bloom_batches: Batches<u32, BloomLine>,
    pub(super) epoch: Array<MapData, u32>,
    pub(super) counts: PerCpuArray<MapData, u64>,
    pub(super) hits: PerCpuArray<MapData, u64>,
    pub(super) slot_names: Array<MapData, Name>,
    pub(super) rule_names: Array<MapData, Name>,
    pub(super) probes: Array<MapData, u64>,
    refusing: Array<MapData, u32>,
    judged: Array<MapData, u32>,
    existing: Array<MapData, u32>,
    pub(super) local_networks: LpmTrie<MapData, Address, u32>,
    pub(super) answers: Array<MapData, Answer>,
    pub(super) unpinned: Unpinned,
}

/// Maps that belong to the programs of one object, rather than to all that enforce the policy.
pub(super) struct Unpinned {
    proof: Array<MapData, u32>,
    proofs: Array<MapData, u32>,
    pub(super) granted: Array<MapData, u32>,
    pub(super) sampled: RingBuf<MapData>,
}

pub(super) fn typed<T>(ebpf: &mut Ebpf, name: &str) -> Result<T>
where
    T: TryFrom<Map, Error = MapError>,
{
    let map = taken(ebpf, name)?;
    T::try_from(map).with_context(|| format!("open the BPF map {name}"))
}

fn taken(ebpf: &mut Ebpf, name: &str) -> Result<Map> {
    let map = ebpf.take_map(name);
    map.with_context(|| format!("find the map {name} in the BPF object"))
}

impl Unpinned {
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self> {
        Ok(Self {
            proof: typed(ebpf, "PROOF")?,
            proofs: typed(ebpf, "PROOFS")?,
            granted: typed(ebpf, ".bss")?,
            sampled: typed(ebpf, "SAMPLES")?,
        })
    }

    /// Has connections to a port over loopback judged; 0: of no port.
    pub(super) fn set_proof(&mut self, port: u16) -> Result<()> {
        self.proof
            .set(0, u32::from(port), 0)
            .context("write the port of the agent's own connection")
    }

    /// How many segments of such connections were dropped.
    pub(super) fn proofs(&self) -> Result<u32> {
        self.proofs.get(&0, 0).context("read the proofs")
    }
}

impl Maps {
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self> {
        let bloom = taken(ebpf, "PREFIX_BLOOM")?;
        Ok(Self {
            ports: typed(ebpf, "PORT_GUARDS")?,
            locals: typed(ebpf, "LOCAL_GUARDS")?,
            protocols: typed(ebpf, "PROTOCOLS")?,
            blocked: Tries::open("BLOCKED4", "BLOCKED6", |name| taken(ebpf, name))?,
            allowed: Tries::open("ALLOWED4", "ALLOWED6", |name| taken(ebpf, name))?,
            ends: typed(ebpf, "ENDS")?,
            bloom_batches: Batches::open(&bloom)?,
            bloom: bloom.try_into().context("open the BPF map PREFIX_BLOOM")?,
            epoch: typed(ebpf, "EPOCH")?,
            counts: typed(ebpf, "COUNTS")?,
            hits: typed(ebpf, "HITS")?,
            slot_names: typed(ebpf, "SLOT_NAMES")?,
            rule_names: typed(ebpf, "RULE_NAMES")?,
            probes: typed(ebpf, "PROBES")?,
            refusing: typed(ebpf, "REFUSING")?,
            judged: typed(ebpf, "JUDGED")?,
            existing: typed(ebpf, "EXISTING")?,
            local_networks: typed(ebpf, "LOCAL_NETWORKS")?,
            answers: typed(ebpf, "ANSWERS_BY_ENGINE")?,
            unpinned: Unpinned::take(ebpf)?,
        })
    }

    pub(super) fn write_answers(&mut self) -> Result<()> {
        for engine in Engine::ALL {
            self.answers
                .set(engine as u32, answer(engine), 0)
                .context("write the answers to refused clients")?;
        }
        Ok(())
    }

    /// Ends the verdicts in the caches: those of another epoch do not match.
    pub(super) fn begin_epoch(&mut self, ports: &[(u32, Guard)]) -> Result<()> {
        let epoch = self.epoch()?.wrapping_add(1);
        self.epoch.set(0, epoch, 0).context("begin an epoch")?;
        for &(port, guard) in ports {
            self.ports
                .set(port, Port::new(guard, epoch), 0)
                .context("begin an epoch")?;
        }
        Ok(())
    }

    pub(super) fn is_judged(&self) -> Result<bool> {
        let judged = self.judged.get(&0, 0);
        let judged = judged.context("read whether connections are judged")?;
        Ok(judged != 0)
    }

    pub(super) fn set_judged(&mut self, judged: bool) -> Result<()> {
        self.judged
            .set(0, u32::from(judged), 0)
            .context("write whether connections are judged")
    }

    pub(super) fn existing(&self) -> Result<Existing> {
        let existing = self.existing.get(&0, 0);
        existing
            .map(Existing)
            .context("read what is done about connections from before")
    }

    pub(super) fn set_existing(&mut self, existing: Existing) -> Result<()> {
        self.existing
            .set(0, existing.0, 0)
            .context("write what is done about connections from before")
    }

    /// Writes only what differs.
    pub(super) fn set_local_networks(&mut self, networks: &BTreeSet<IpNet>) -> Result<()> {
        let key = |network: &IpNet| {
            let (address, length) = match network {
                IpNet::V4(network) => (mapped(network.network().octets()), 96),
                IpNet::V6(network) => (network.network().octets(), 0),
            };
            let [a, b, c, d] = [0, 4, 8, 12].map(|at| {
                let [a, b, c, d] = [0, 1, 2, 3].map(|byte| address[at + byte]);
                u32::from_ne_bytes([a, b, c, d])
            });
            let length = length + u32::from(network.prefix_len());
            (length, [a, b, c, d])
        };
        let wanted: BTreeSet<(u32, Address)> = networks.iter().map(key).collect();
        let found = self.local_networks.keys();
        let found: Result<BTreeSet<_>, MapError> = found
            .map(|key| key.map(|key| (key.prefix_len(), key.data())))
            .collect();
        let found = found?;
        for &(length, address) in wanted.difference(&found) {
            self.local_networks
                .insert(&Key::new(length, address), 1, 0)?;
        }
        for &(length, address) in found.difference(&wanted) {
            self.local_networks.remove(&Key::new(length, address))?;
        }
        Ok(())
    }

    /// Ends the search for refused connections. Where there still are any, the program at the sockets begins it anew.
    pub(super) fn end_refusing(&mut self) -> Result<()> {
        self.refusing
            .set(0, 0, 0)
            .context("write that no connection is refused")
    }

    fn epoch(&self) -> Result<u32> {
        self.epoch.get(&0, 0).context("read the epoch")
    }

    /// Writes steps of one kind that are independent of each other, in batches: prefixes, or lines of the Bloom filter. Two
    /// threads share a long run: each holds a trie's lock for one prefix at a time. Returns the batches that failed,
    /// of which any step may have been written.
    pub(super) fn write_batches<'a>(&self, steps: &'a [Step]) -> Vec<&'a [Step]> {
        let (allowed, bloom) = (&self.allowed, &self.bloom_batches);
        let write = |steps: &[Step]| {
            let prefixes: Option<Vec<_>> = steps.iter().map(Step::prefix).collect();
            if let Some(prefixes) = prefixes {
                return allowed.write_batch(&prefixes);
            }
            let lines: Option<Vec<_>> = steps.iter().map(Step::bloom_line).collect();
            let lines = lines.context("find prefixes or lines of the Bloom filter")?;
            let (lines, bits): (Vec<_>, Vec<_>) = lines.into_iter().unzip();
            Ok(bloom.update(&lines, &bits)?)
        };
        let failed = |steps: &'a [Step]| {
            let batches = steps.chunks(BATCH);
            let failed: Vec<_> = batches.filter(|batch| write(batch).is_err()).collect();
            failed
        };
        if steps.len() < MANY {
            return failed(steps);
        }
        let (first, second) = steps.split_at(steps.len() / 2);
        thread::scope(|scope| {
            let second_failed = scope.spawn(|| failed(second));
            let mut all = failed(first);
            // A thread that panicked may have written nothing.
            all.extend(second_failed.join().unwrap_or_else(|_| vec![second]));
            all
        })
    }

    pub(super) fn write(&mut self, step: &Step) -> Result<()> {
        match *step {
            Step::Slot(ref change) => self
                .slot_names
                .set(change.key, change.new.unwrap_or(Name::FREE), 0)
                .with_context(|| format!("write the name of slot {}", change.key)),
            Step::Rule(ref change) => self
                .rule_names
                .set(change.key, change.new.unwrap_or(Name::FREE), 0)
                .with_context(|| format!("write the name of rule {}", change.key)),
            Step::End(Change { key, new, .. }) => self
                .ends
                .set(key, new.unwrap_or_default().0, 0)
                .with_context(|| format!("write the end of rule {key}")),
            Step::Prefix(ref step) => self.allowed.write(step),
            Step::Block(ref step) => self.blocked.write(step),
            Step::Bloom(ref change) => self
                .bloom
                .set(change.key, change.new.unwrap_or_default(), 0)
                .context("write the prefix Bloom filter"),
            Step::Local(Change { key, new, .. }) => match new {
                Some(guard) => self.locals.insert(key, guard, 0),
                None => absent_is_none(self.locals.remove(&key)).map(drop),
            }
            .with_context(|| {
                let address = Ipv6Addr::from(key.address).to_canonical();
                format!(
                    "guard {address}: there is room for {MAX_LOCALS} local addresses times ports, \
                     those of the old and the new policy together; reload in two steps"
                )
            }),
            Step::Port(Change { key, new, .. }) => {
                let epoch = self.epoch()?;
                let port = new.map_or(Port::default(), |guard| Port::new(guard, epoch));
                self.ports
                    .set(key, port, 0)
                    .with_context(|| format!("write the guard of port {}", key as u16))
            }
            Step::Epoch(ref ports) => self.begin_epoch(ports),
            Step::Protocols { new, .. } => self
                .protocols
                .set(0, new, 0)
                .context("write the guarded protocols"),
        }
    }
}

impl Maps {
    /// The value that decides on a source at a database now, as the packet path finds it; `None`: no rule allows it.
    pub(super) fn value(&self, slot: u16, source: IpAddr) -> Result<Option<RuleValue>> {
        let now = BootTime::now();
        let in_force = |value: Option<RuleValue>| {
            let Some(rule) = value.and_then(RuleValue::end) else {
                return Ok(value);
            };
            let end = self.ends.get(&rule, 0).context("read the end of a rule")?;
            Ok::<_, Error>(value.filter(|_| BootTime(end) > now))
        };
        let member = self.allowed.find(Section::cluster(slot), source)?;
        if let Some(member) = in_force(member)? {
            return Ok(Some(member));
        }
        let section = Section::rules(slot);
        let Some(rule) = in_force(self.allowed.find(section, source)?)? else {
            return Ok(None);
        };
        let block = in_force(self.blocked.find(section, source)?)?;
        Ok(Some(block.unwrap_or(rule)))
    }
}
