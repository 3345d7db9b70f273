//! The control socket: the bytes of a connection, up to what the agent is asked to do. There is no agent behind it, and
//! no filter: every request that is understood fails.

#![no_main]

use std::{cell::LazyCell, path::PathBuf, sync::Arc, time::Duration};

use anyhow::anyhow;
use filter_agent::{
    clock::{BootTime, Clock, Now},
    control::{Server, Shared},
    enforcer::Handle,
    event::{Event, Request},
    fleet::state::State as Fleet,
    history::History,
    metrics::{scrape::Scraper, timings::Timings},
    policy_file::PolicyFile,
    region::state::Regions,
    report,
    snapshot::Snapshot,
    temporary::{Change, Timed},
};
use filter_fuzz::{now, plant};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    runtime::{Builder, Runtime},
    sync::{
        Mutex,
        mpsc::{UnboundedReceiver, unbounded_channel},
        watch,
    },
};

/// Far longer than any answer takes: none waits for anything.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Turns of the runtime, at each of which it looks at sockets, within which the server has done what it does.
const MAX_TURNS: usize = 64;

struct Setup {
    runtime: Runtime,
    folder: TempDir,
    requests: Mutex<UnboundedReceiver<Event>>,
    _server: Server,
}

thread_local! {
    static SETUP: LazyCell<Setup> = LazyCell::new(setup);
}

fn setup() -> Setup {
    let mut runtime = Builder::new_current_thread();
    let runtime = runtime.enable_all().event_interval(1).build();
    let runtime = runtime.expect("a runtime");
    let folder = tempfile::tempdir().expect("a folder");
    let text = "interfaces: [eth0]\ndatabases: []\nregions: {office: {file: /etc/office}}\n";
    let path = PathBuf::from("/etc/filter-agent/policy.yaml");
    let file = PolicyFile::parse(&path, text.into()).expect("a policy");
    let beginning = Now {
        boot: BootTime::default(),
        steady: now(),
        wall: now(),
    };
    let snapshot = Snapshot {
        now: beginning,
        timed: Timed::of(&file.policy, beginning),
        fleet: Fleet::restore(Default::default(), &file.policy, now()).into(),
        this_host: Default::default(),
        window: None,
        started: now(),
        file: Arc::new(file),
        enforced: report::Enforced {
            file: path,
            timing: report::Timing {
                accepted: now(),
                compiled_ms: 0.0,
                enforced_ms: 0.0,
                verified_ms: None,
                interfaces: Vec::new(),
            },
            next_expiry: None,
        },
        regions: Regions::new(),
        errors: Vec::new(),
        unsaved: Vec::new(),
        history: History::default(),
    };
    let (events, requests) = unbounded_channel();
    let server = runtime.block_on(async {
        let listener = UnixListener::bind(folder.path().join("socket")).expect("a socket");
        let (handle, _) = Handle::new();
        let snapshot = watch::channel(snapshot).1;
        let clock = Clock::start();
        let timings = Timings::new().expect("histograms");
        let failure = watch::channel(None).1;
        let scraper = Scraper::new(snapshot.clone(), handle.clone(), clock, timings, failure);
        let shared = Shared {
            events,
            snapshot,
            enforcer: handle,
            clock,
            scraper: scraper.into(),
        };
        Server::start(listener, shared)
    });
    Setup {
        runtime,
        folder,
        requests: requests.into(),
        _server: server,
    }
}

libfuzzer_sys::fuzz_target!(|sent: &[u8]| {
    SETUP.with(|setup| {
        let conversation = async { tokio::time::timeout(TIMEOUT, converse(setup, sent)).await };
        let (received, requests) = setup
            .runtime
            .block_on(conversation)
            .expect("an answer in time");
        check(sent, &received, &requests);
    });
});

/// Sends the bytes, and refuses what they ask for. Returns the answer and the requests.
async fn converse(setup: &Setup, sent: &[u8]) -> (Vec<u8>, Vec<Asked>) {
    let stream = UnixStream::connect(setup.folder.path().join("socket")).await;
    let mut stream = stream.expect("the server listens");
    let mut requests = setup.requests.lock().await;
    let mut handled = Vec::new();
    // Fails where the server has answered before it read everything.
    let _ = stream.write_all(sent).await;
    let mut idle = 0;
    while idle < MAX_TURNS {
        tokio::task::yield_now().await;
        idle += 1;
        if let Ok(Event::Request(request)) = requests.try_recv() {
            handled.push(refuse(request));
            idle = 0;
        }
    }
    // A request of which a part is missing gets none.
    let _ = stream.shutdown().await;
    let mut received = Vec::new();
    let _ = stream.read_to_end(&mut received).await;
    assert!(
        requests.is_empty(),
        "the agent is asked for what did not arrive"
    );
    (received, handled)
}

/// What the agent was asked for.
#[derive(Debug, PartialEq)]
enum Asked {
    /// The text of a policy; `None`: the agent's own file.
    Plan(Option<String>),
    /// Whether what is no longer guarded was allowed.
    Reload(bool),
    /// The same.
    Rollback(bool),
    /// Whether the policy that is tried is taken back.
    Confirm(bool),
    /// Whether what comes is accepted of other regions than the seeds name.
    Refresh {
        other: bool,
    },
    Temporary(Change),
    Detach,
}

fn refuse(request: Request) -> Asked {
    let refusal = || anyhow!("refused");
    match request {
        Request::Plan { text, reply, .. } => {
            reply.send(Err(refusal()));
            Asked::Plan(text)
        }
        Request::Reload { options, reply } => {
            reply.send(Err(refusal()));
            Asked::Reload(options.allow_unprotect)
        }
        Request::Rollback { options, reply, .. } => {
            reply.send(Err(refusal()));
            Asked::Rollback(options.allow_unprotect)
        }
        Request::Confirm {
            fall_back, reply, ..
        } => {
            reply.send(Err(refusal()));
            Asked::Confirm(fall_back)
        }
        Request::Refresh {
            region,
            accept,
            reply,
        } => {
            reply.send(Err(refusal()));
            Asked::Refresh {
                other: accept && region.as_deref() != Some("office"),
            }
        }
        Request::Temporary {
            change, by, reply, ..
        } => {
            reply.send(Err(refusal()));
            assert!(by.is_some_and(|by| by.pid.is_some()));
            Asked::Temporary(change)
        }
        Request::Detach { by, reply } => {
            reply.send(Err(refusal()));
            assert!(by.is_some_and(|by| by.pid.is_some()));
            Asked::Detach
        }
    }
}

fn check(sent: &[u8], received: &[u8], asked: &[Asked]) {
    assert!(asked.len() <= 1, "one request a connection: {asked:?}");
    let lossy = String::from_utf8_lossy(sent);
    // Empty lines may come before a request (RFC 9112 section 2.2).
    let request = lossy.trim_start_matches(['\r', '\n']);
    if let Some(asked) = asked.first() {
        let (method, path) = match asked {
            Asked::Plan(None) => ("GET", "plan"),
            Asked::Plan(Some(_)) => ("POST", "plan"),
            Asked::Reload(_) => ("POST", "reload"),
            Asked::Rollback(_) => ("POST", "rollback"),
            Asked::Confirm(_) => ("POST", "confirm"),
            Asked::Refresh { .. } => ("POST", "refresh"),
            Asked::Temporary(Change::Create(_)) => ("POST", "databases/"),
            Asked::Temporary(Change::Amend(_)) => ("PATCH", "databases/"),
            Asked::Temporary(Change::Remove { .. }) => ("DELETE", "databases/"),
            Asked::Temporary(_) => ("POST", "temporary"),
            Asked::Detach => ("POST", "detach"),
        };
        let line = request.lines().next().unwrap_or_default();
        // HEAD is a GET without the answer's body.
        let is_read = method == "GET" && line.starts_with("HEAD ");
        assert!(
            line.starts_with(&format!("{method} ")) || is_read,
            "{asked:?}: {line}"
        );
        assert!(line.contains(&format!("/v1/{path}")), "{asked:?}: {line}");
        plant(*asked == Asked::Refresh { other: true });
    }
    if received.is_empty() {
        assert!(asked.is_empty(), "no answer to {asked:?}");
        return;
    }
    let text = String::from_utf8(received.to_vec()).expect("an answer is text");
    // `Expect: 100-continue` is answered on its own.
    let text = text
        .strip_prefix("HTTP/1.1 100 Continue\r\n\r\n")
        .unwrap_or(&text);
    let (head, body) = text.split_once("\r\n\r\n").expect("a whole head");
    let status = head.split(' ').nth(1).expect("a status");
    let known = [
        "200", "400", "404", "405", "408", "413", "414", "422", "431", "500", "503",
    ];
    assert!(known.contains(&status), "{head}");
    let is_head = request.starts_with("HEAD ");
    // What is not HTTP is refused before anything reads it, without a body.
    if status != "200" && head.contains("application/json") && !is_head {
        let failure: report::Failure = serde_json::from_str(body).expect("an error is JSON");
        assert!(!failure.error.is_empty());
    }
    if status == "200" && !is_head {
        let answer: serde_json::Value = serde_json::from_str(body).expect("an answer is JSON");
        assert!(answer.is_object());
        assert!(asked.is_empty());
    }
}
