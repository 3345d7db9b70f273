//! Hosts without a kernel: the agent's own code follows etcd, judges and compiles, on a connection and with a certificate
//! of each host's own. Only the writes to the maps are missing.

use std::{
    hint::black_box,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, Receiver, Sender},
    },
    thread::{self, JoinHandle, available_parallelism, sleep},
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use filter_agent::{
    clock::Clock,
    compile::compile,
    etcd::{self, Following},
    fleet::{
        Answer, News, Settings, ThisHost,
        host_status::{Bounds, DatabaseStatus, HostStatus},
        state::{Kept, State},
        with_rules,
    },
    policy_file::PolicyFile,
    report::FleetState,
    rules::Regions,
    temporary::Timed,
};
use filter_tests::{certificates::Pair, etcd::Etcd, net::run_in};
use jiff::Timestamp;
use tokio::sync::{oneshot, watch};

use super::{DATABASE, PATIENCE, real};

/// A host's name and certificate.
pub type Named = (String, Pair);

/// Until it is dropped.
pub struct Simulated {
    in_force: Receiver<InForce>,
    /// By host: the revision of its document, and since when.
    latest: Vec<Option<(i64, Instant)>>,
    tally: Arc<Tally>,
    threads: Vec<(Option<oneshot::Sender<()>>, JoinHandle<()>)>,
}

/// A host has compiled the rules of a document.
struct InForce {
    place: usize,
    revision: i64,
    at: Instant,
}

#[derive(Default)]
struct Tally {
    lost: AtomicU64,
    /// Statuses in etcd.
    written: AtomicU64,
    /// Why the last one was lost, or not written.
    complaint: Mutex<Option<String>>,
    /// Seconds that judging and compiling took.
    compiling: Mutex<Vec<f64>>,
}

impl Simulated {
    pub fn start(etcd: &Etcd, hosts: Vec<Named>) -> Result<Self> {
        let (send, in_force) = mpsc::channel();
        let tally = Arc::new(Tally::default());
        let latest = vec![None; hosts.len()];
        let mut all = Vec::with_capacity(hosts.len());
        for (place, (name, pair)) in hosts.into_iter().enumerate() {
            let policy = real::policy_of(etcd, &name, &pair);
            let file = PolicyFile::parse(Path::new("policy.yaml"), policy)?;
            all.push(Host::new(place, name, file, send.clone(), tally.clone()));
        }
        let count = available_parallelism()?.get();
        let of_thread = all.len().div_ceil(count);
        let mut threads = Vec::new();
        while !all.is_empty() {
            let hosts = all.split_off(all.len().saturating_sub(of_thread));
            let (stop, stopped) = oneshot::channel();
            let namespace = etcd.host.name.clone();
            let thread = thread::spawn(move || run_in(&namespace, || follow(hosts, stopped)));
            threads.push((Some(stop), thread));
        }
        Ok(Self {
            in_force,
            latest,
            tally,
            threads,
        })
    }

    /// Waits until each host has a document of this revision or a later one. Returns since when.
    ///
    /// # Errors
    /// One has none in time.
    pub fn wait_for(&mut self, revision: i64) -> Result<Vec<Instant>> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let missing = self.missing(revision);
            if missing == 0 {
                break;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(InForce {
                place,
                revision,
                at,
            }) = self.in_force.recv_timeout(left)
            else {
                bail!(
                    "{missing} hosts do not get to revision {revision}: {:?}",
                    self.complaint()
                );
            };
            self.latest[place] = Some((revision, at));
            // What has arrived meanwhile is counted with it.
            for it in self.in_force.try_iter() {
                self.latest[it.place] = Some((it.revision, it.at));
            }
        }
        let latest = self.latest.iter().flatten();
        Ok(latest.map(|&(_, at)| at).collect())
    }

    fn missing(&self, revision: i64) -> usize {
        let latest = self.latest.iter();
        let missing = latest.filter(|it| it.is_none_or(|(found, _)| found < revision));
        missing.count()
    }

    /// Waits until the hosts have nothing more to report.
    pub fn settle(&self) {
        let deadline = Instant::now() + PATIENCE;
        let mut before = None;
        while before != Some(self.written()) && Instant::now() < deadline {
            before = Some(self.written());
            sleep(Duration::from_millis(500));
        }
    }

    pub fn lost(&self) -> u64 {
        self.tally.lost.load(Ordering::Relaxed)
    }

    pub fn written(&self) -> u64 {
        self.tally.written.load(Ordering::Relaxed)
    }

    pub fn complaint(&self) -> Option<String> {
        self.tally.complaint.lock().unwrap().clone()
    }

    /// Seconds that judging and compiling took, since the last call.
    pub fn compiling(&self) -> Vec<f64> {
        std::mem::take(&mut self.tally.compiling.lock().unwrap())
    }
}

impl Drop for Simulated {
    fn drop(&mut self) {
        for (stop, thread) in self.threads.drain(..) {
            drop(stop);
            let ended = thread.join();
            assert!(thread::panicking() || ended.is_ok(), "a host failed");
        }
    }
}

fn follow(hosts: Vec<Host>, stopped: oneshot::Receiver<()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime starts");
    runtime.block_on(async {
        let following: Vec<Following> = hosts.into_iter().map(Host::follow).collect();
        let _ = stopped.await;
        drop(following);
    });
}

struct Host {
    place: usize,
    file: Arc<PolicyFile>,
    this_host: ThisHost,
    settings: Settings,
    clock: Clock,
    state: Mutex<State>,
    send: Sender<InForce>,
    tally: Arc<Tally>,
}

impl Host {
    fn new(
        place: usize,
        name: String,
        file: PolicyFile,
        send: Sender<InForce>,
        tally: Arc<Tally>,
    ) -> Self {
        let clock = Clock::start();
        let this_host = ThisHost::new(name, Some(format!("boot-{place}")));
        let settings = Settings::of(&file.policy, &this_host).expect("the policy has a fleet");
        let state = State::restore(Kept::default(), &file.policy, clock.now().steady);
        Self {
            place,
            file: file.into(),
            this_host,
            settings,
            clock,
            state: state.into(),
            send,
            tally,
        }
    }

    fn follow(self) -> Following {
        let (reports, receiver) = watch::channel(None);
        etcd::follow(self.settings.clone(), receiver, move |news| {
            self.take(news, &reports);
        })
    }

    fn take(&self, news: News, reports: &watch::Sender<Option<Arc<HostStatus>>>) {
        let complain = |text| *self.tally.complaint.lock().unwrap() = Some(text);
        match news {
            News::Lost(why) => {
                self.tally.lost.fetch_add(1, Ordering::Relaxed);
                complain(why);
            }
            News::Status(Ok(())) => {
                self.tally.written.fetch_add(1, Ordering::Relaxed);
            }
            News::Status(Err(why)) => complain(why.describe(&format!("{}", self.place))),
            News::Answer { answer, .. } => {
                if let Some(status) = self.answer(&answer) {
                    reports.send_replace(Some(status.into()));
                }
            }
        }
    }

    /// As the agent does it. Returns the new status, if there is one.
    fn answer(&self, answer: &Answer) -> Option<HostStatus> {
        let begun = Instant::now();
        let now = self.clock.now();
        let mut state = self.state.lock().unwrap();
        let before = revision_of(&state);
        let next = state.take(answer, &self.file.policy, now.steady);
        let next = next.without_rollouts_over(now.wall).unwrap_or(next);
        let revision = revision_of(&next)?;
        if before == Some(revision) {
            *state = next;
            return None;
        }
        let file = with_rules(&self.file, &next, &self.this_host, now);
        let timed = Timed::of(&file.policy, now);
        black_box(compile(&file.policy, &Regions::default(), &timed));
        let status = self.status(&next, &file, now.wall);
        *state = next;
        let at = Instant::now();
        let mut compiling = self.tally.compiling.lock().unwrap();
        compiling.push((at - begun).as_secs_f64());
        // Nobody waits for the last ones.
        let _ = self.send.send(InForce {
            place: self.place,
            revision,
            at,
        });
        Some(status)
    }

    fn status(&self, state: &State, file: &PolicyFile, at: Timestamp) -> HostStatus {
        let good = &state.documents()[DATABASE];
        let database = &file.policy.databases[0];
        let bounds = database.fleet.as_ref().map(|fleet| Bounds {
            widest: fleet.bounds.widest.map(|length| format!("/{length}")),
            within: fleet.bounds.within.clone(),
            regions: fleet.bounds.regions.clone().unwrap_or_default(),
            floor: database.rules().len(),
        });
        let status = DatabaseStatus {
            seen: Some(good.mod_revision),
            enforced: Some(good.mod_revision),
            sha256: Some(good.sha256.clone()),
            state: FleetState::Active,
            error: None,
            enforced_ms: Some(1.0),
            rules: database.fleet_rules().len(),
            temporary: 0,
            bounds,
            packets: None,
        };
        let marks = state.marks();
        let own = self.settings.own.as_ref();
        HostStatus {
            agent: env!("CARGO_PKG_VERSION").into(),
            boot: own.map(|own| own.boot.clone()).unwrap_or_default(),
            cluster: marks.map(|marks| marks.cluster.into()),
            era: marks.map(|marks| marks.era),
            revision: marks.map(|marks| marks.revision),
            at,
            databases: [(DATABASE.to_owned(), status)].into(),
        }
    }
}

fn revision_of(state: &State) -> Option<i64> {
    Some(state.documents().get(DATABASE)?.mod_revision)
}
