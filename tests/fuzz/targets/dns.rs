//! Answers of name servers, from the bytes of DNS messages to addresses. The first byte chooses how many names are looked
//! up; then comes one message after the other, each behind its length in two bytes, for one query each.

#![no_main]

use std::{
    collections::BTreeSet,
    sync::{Arc, LazyLock, Mutex},
    time::Duration,
};

use filter_agent::{
    policy::{Dns, DnsType},
    region::{
        answer::Found,
        dns::{Asked, OwnRecords},
    },
};
use filter_fuzz::{check_prefixes, plant, take};
use futures_util::stream::{self, BoxStream, StreamExt as _};
use hickory_resolver::{
    net::{DnsError, NetError, runtime::TokioRuntimeProvider, xfer::DnsHandle},
    proto::{
        op::{DnsRequest, DnsRequestOptions, DnsResponse},
        rr::{Name, RData, Record},
    },
};
use ipnet::IpNet;

/// Queries for one name: of each type the name itself and its aliases.
const MAX_QUERIES: usize = 2 * 9;

const NAMES: [&str; 2] = ["egress.test", "Other.Test."];

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let Some((&choice, messages)) = input.split_first() else {
        return;
    };
    let dns = Dns {
        names: NAMES[..1 + usize::from(choice % 2)]
            .iter()
            .map(|name| (*name).into())
            .collect(),
        records: vec![DnsType::A, DnsType::Aaaa],
        nameservers: Vec::new(),
        dnssec: false,
        trust_anchor: None,
        ca_file: None,
    };
    let servers = Servers::new(messages, false);
    let result = look_up(&servers, &dns);
    let asked = servers.0.lock().expect("one thread").clone();
    assert!(asked.queries <= MAX_QUERIES * dns.names.len());
    if let Ok(found) = &result {
        check(&dns, &asked.answers, found);
        let good = take(found);
        let is_short = found.ask_again < Some(Duration::from_secs(60));
        plant(good && found.prefixes.len() > 2 && is_short);
    }
    // The order of an answer's records makes no difference.
    let other = look_up(&Servers::new(messages, true), &dns);
    match (result, other) {
        (Ok(one), Ok(other)) => {
            let set = |found: &Found| BTreeSet::from_iter(found.prefixes.clone());
            assert_eq!(set(&one), set(&other));
            assert_eq!(one.ask_again, other.ask_again);
        }
        (one, other) => assert!(one.is_err() && other.is_err(), "{one:?}, {other:?}"),
    }
});

/// Addresses come from records of a name that was looked up, or of one that its aliases lead to.
fn check(dns: &Dns, answers: &[Record], found: &Found) {
    let mut owners: Vec<Name> = Vec::new();
    for name in &dns.names {
        let absolute = format!("{}.", name.trim_end_matches('.'));
        owners.push(Name::from_ascii(absolute).expect("a name"));
    }
    let mut next = 0;
    while let Some(owner) = owners.get(next).cloned() {
        for record in answers.iter().filter(|record| record.name == owner) {
            if let RData::CNAME(target) = &record.data
                && !owners.contains(&target.0)
            {
                owners.push(target.0.clone());
            }
        }
        next += 1;
    }
    let own = answers
        .iter()
        .filter(|record| owners.contains(&record.name));
    let own: Vec<&Record> = own.collect();
    let of = |record: &Record| -> Option<IpNet> {
        match record.data {
            RData::A(address) => Some(IpNet::V4(address.0.into())),
            RData::AAAA(address) => Some(IpNet::V6(address.0.into())),
            _ => None,
        }
    };
    assert!(!found.prefixes.is_empty());
    check_prefixes(&found.prefixes);
    for prefix in &found.prefixes {
        assert!(
            own.iter().any(|record| of(record) == Some(*prefix)),
            "{prefix} is foreign"
        );
    }
    let ttl = found.ask_again.expect("records have times").as_secs();
    assert!(own.iter().any(|record| u64::from(record.ttl) == ttl));
}

/// For the time limit of each type of records, which never ends: every answer is there at once.
static RUNTIME: LazyLock<tokio::runtime::Runtime> = LazyLock::new(|| {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_time().build().expect("a runtime")
});

fn look_up(servers: &Servers, dns: &Dns) -> Result<Found, String> {
    let asked = Asked {
        handle: OwnRecords(servers.clone()),
        options: DnsRequestOptions::default(),
        timeout: Duration::from_hours(1),
    };
    let found = RUNTIME.block_on(asked.resolve(dns));
    found.map_err(|error| format!("{error:#}"))
}

#[derive(Clone)]
struct Servers(Arc<Mutex<Exchange>>);

/// The queries and answers of a look-up.
#[derive(Clone)]
struct Exchange {
    /// What is left of the messages.
    messages: Vec<u8>,
    /// Whether the records of answers come in reverse.
    reversed: bool,
    queries: usize,
    /// The records of all answers so far.
    answers: Vec<Record>,
}

impl Servers {
    fn new(messages: &[u8], reversed: bool) -> Self {
        Self(Arc::new(Mutex::new(Exchange {
            messages: messages.into(),
            reversed,
            queries: 0,
            answers: Vec::new(),
        })))
    }
}

impl Exchange {
    /// The answer to the next query, as hickory's pool of name servers gives it.
    fn answer(&mut self) -> Result<DnsResponse, NetError> {
        self.queries += 1;
        let Some((length, rest)) = self.messages.split_first_chunk::<2>() else {
            return Err(NetError::Timeout);
        };
        let length = usize::from(u16::from_be_bytes(*length)).min(rest.len());
        let (message, rest) = rest.split_at(length);
        let (message, rest) = (message.to_vec(), rest.to_vec());
        self.messages = rest;
        let mut response = DnsResponse::from_buffer(message)?;
        self.answers.extend(response.answers.iter().cloned());
        if self.reversed {
            response.answers.reverse();
        }
        Ok(DnsError::from_response(response)?)
    }
}

impl DnsHandle for Servers {
    type Response = BoxStream<'static, Result<DnsResponse, NetError>>;
    type Runtime = TokioRuntimeProvider;

    fn send(&self, _: DnsRequest) -> Self::Response {
        let answer = self.0.lock().expect("one thread").answer();
        stream::iter([answer]).boxed()
    }
}
