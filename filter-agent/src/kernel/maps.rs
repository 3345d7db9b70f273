//! The maps: opening, reading and writing them.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv6Addr},
    os::fd::AsFd as _,
};

use anyhow::{Context as _, Error, Result, ensure};
use aya::{
    Ebpf,
    maps::{Array, HashMap, LpmTrie, Map, MapData, MapError, PerCpuArray, RingBuf, lpm_trie::Key},
};
use filter_common::{
    Address, Answer, BLOOM_LINES, BloomLine, Engine, Existing, Guard, LocalKey, MAX_LOCALS, Name,
    PORTS, Port, RULE_IDS, RuleValue, SECTION_BITS, SLOTS, Section, Source4, Source6, mapped,
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::{
    clock::BootTime,
    kernel::{
        answer::answer,
        change::Change,
        image::{Image, Prefixes},
        layout::PinnedMaps,
        steps::{PrefixStep, Step},
    },
};

pub(super) struct Maps {
    pub(super) ports: Array<MapData, Port>,
    pub(super) locals: HashMap<MapData, LocalKey, Guard>,
    pub(super) protocols: Array<MapData, u32>,
    pub(super) allowed: Tries,
    pub(super) blocked: Tries,
    ends: Array<MapData, u64>,
    pub(super) bloom: Array<MapData, BloomLine>,
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
    let map = ebpf.take_map(name).context("find it in the BPF object");
    map.and_then(|map| Ok(T::try_from(map)?))
        .with_context(|| format!("open the BPF map {name}"))
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
        Ok(Self {
            ports: typed(ebpf, "PORT_GUARDS")?,
            locals: typed(ebpf, "LOCAL_GUARDS")?,
            protocols: typed(ebpf, "PROTOCOLS")?,
            blocked: Tries {
                v4: typed(ebpf, "BLOCKED4")?,
                v6: typed(ebpf, "BLOCKED6")?,
            },
            allowed: Tries {
                v4: typed(ebpf, "ALLOWED4")?,
                v6: typed(ebpf, "ALLOWED6")?,
            },
            ends: typed(ebpf, "ENDS")?,
            bloom: typed(ebpf, "PREFIX_BLOOM")?,
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

    /// Reads the image. Arrays are read whole: the kernel does not list the elements that are set.
    pub(super) fn read(&self) -> Result<Image> {
        self.try_read().context("read the maps")
    }

    fn try_read(&self) -> Result<Image, MapError> {
        let mut image = Image {
            protocols: self.protocols.get(&0, 0)?,
            ..Image::default()
        };
        for slot in 1..SLOTS {
            let name = self.slot_names.get(&slot, 0)?;
            if name != Name::FREE {
                image.slots.push((slot, name));
            }
        }
        for id in 0..RULE_IDS {
            let name = self.rule_names.get(&id, 0)?;
            if name != Name::FREE {
                image.rules.push((id, name));
            }
            let end = self.ends.get(&id, 0)?;
            if end != 0 {
                image.ends.push((id, BootTime(end)));
            }
        }
        for index in 0..PORTS {
            let guard = self.ports.get(&index, 0)?.guard();
            if !guard.is_none() {
                image.ports.push((index, guard));
            }
        }
        for line in 0..BLOOM_LINES {
            let bits = self.bloom.get(&line, 0)?;
            if bits != BloomLine::default() {
                image.bloom.push((line, bits));
            }
        }
        for entry in self.locals.iter() {
            image.locals.push(entry?);
        }
        (image.allowed4, image.allowed6) = self.allowed.read()?;
        (image.blocked4, image.blocked6) = self.blocked.read()?;
        image.locals.sort_unstable_by_key(|&(key, _)| key);
        Ok(image)
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

/// Allowed or blocked prefixes of every database, by address family.
pub(super) struct Tries {
    v4: LpmTrie<MapData, Source4, RuleValue>,
    v6: LpmTrie<MapData, Source6, RuleValue>,
}

impl Tries {
    /// Opens the tries of allowed prefixes again, for a second writer thread.
    pub(super) fn open(maps: &PinnedMaps) -> Result<Self> {
        let open = |name: &str| {
            let map = maps.get(name).context("find it")?;
            let fd = map.fd().as_fd().try_clone_to_owned()?;
            anyhow::Ok(Map::LpmTrie(MapData::from_fd(fd)?))
        };
        let open = |name: &str| open(name).with_context(|| format!("open the map {name}"));
        Ok(Self {
            v4: open("ALLOWED4")?.try_into()?,
            v6: open("ALLOWED6")?.try_into()?,
        })
    }

    /// Reads both, each sorted by key.
    fn read(&self) -> Result<(Prefixes<Ipv4Net>, Prefixes<Ipv6Net>), MapError> {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        // Only this agent writes the maps, and only prefixes.
        for entry in self.v4.iter() {
            let (key, value) = entry?;
            let Source4 { section, address } = key.data();
            let length = key.prefix_len().saturating_sub(SECTION_BITS) as u8;
            let prefix = Ipv4Net::new(address.into(), length);
            v4.extend(prefix.map(|prefix| ((section, prefix), value)));
        }
        for entry in self.v6.iter() {
            let (key, value) = entry?;
            let Source6 { section, address } = key.data();
            let length = key.prefix_len().saturating_sub(SECTION_BITS) as u8;
            let prefix = Ipv6Net::new(address.into(), length);
            v6.extend(prefix.map(|prefix| ((section, prefix), value)));
        }
        v4.sort_unstable_by_key(|&(key, _)| key);
        v6.sort_unstable_by_key(|&(key, _)| key);
        Ok((v4, v6))
    }

    pub(super) fn write(&mut self, step: &PrefixStep) -> Result<()> {
        match *step {
            PrefixStep::V4(Change { key, new, .. }) => {
                let (section, prefix) = key;
                write_prefix(&mut self.v4, &source4(section, prefix), new)
                    .with_context(|| format!("write prefix {prefix}"))
            }
            PrefixStep::V6(Change { key, new, .. }) => {
                let (section, prefix) = key;
                write_prefix(&mut self.v6, &source6(section, prefix), new)
                    .with_context(|| format!("write prefix {prefix}"))
            }
        }
    }

    /// The value of the longest prefix of a section that holds a source.
    pub(super) fn find(&self, section: Section, source: IpAddr) -> Result<Option<RuleValue>> {
        let found = match source {
            IpAddr::V4(source) => self.v4.get(&source4(section, source.into()), 0),
            IpAddr::V6(source) => self.v6.get(&source6(section, source.into()), 0),
        };
        absent_is_none(found).context("look the source up in the kernel")
    }
}

/// Writes one entry and reads it back: inserts into a trie have been seen to fail under memory
/// pressure, and a batch of them to be lost (kernel 6.18).
fn write_prefix<K: aya::Pod>(
    trie: &mut LpmTrie<MapData, K, RuleValue>,
    key: &Key<K>,
    new: Option<RuleValue>,
) -> Result<()> {
    let Some(value) = new else {
        absent_is_none(trie.remove(key))?;
        return Ok(());
    };
    trie.insert(key, value, 0)?;
    // The longest match of a prefix that is in the trie is that prefix.
    ensure!(
        trie.get(key, 0)? == value,
        "the kernel does not hold what was written"
    );
    Ok(())
}

/// aya names a missing key in three ways, by map type and call.
fn absent_is_none<T>(result: Result<T, MapError>) -> Result<Option<T>, MapError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound | MapError::ElementNotFound) => Ok(None),
        Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn source4(section: Section, prefix: Ipv4Net) -> Key<Source4> {
    let address = prefix.network().octets();
    let source = Source4 { section, address };
    Key::new(SECTION_BITS + u32::from(prefix.prefix_len()), source)
}

fn source6(section: Section, prefix: Ipv6Net) -> Key<Source6> {
    let address = prefix.network().octets();
    let source = Source6 { section, address };
    Key::new(SECTION_BITS + u32::from(prefix.prefix_len()), source)
}
