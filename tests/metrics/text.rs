//! The text of a scrape, and an HTTP client that sends what it is told to.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
};

use filter_tests::net::{Net, PATIENCE};

/// Answer to a request: status and body.
pub fn request(net: &Net, address: SocketAddr, head: &str) -> (u16, String) {
    net.db.run(|| {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(head.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        let status = head
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok());
        (status.unwrap_or_default(), body.to_owned())
    })
}

/// HTTP/1.0: the answer comes whole, not in chunks.
pub fn get(net: &Net, address: SocketAddr, path: &str) -> (u16, String) {
    request(net, address, &format!("GET {path} HTTP/1.0\r\n\r\n"))
}

/// Whether nothing listens there.
pub fn refuses(net: &Net, address: SocketAddr) -> bool {
    net.db.run(|| TcpStream::connect(address).is_err())
}

/// The series of a scrape: `name{label="value"}` to its value.
pub struct Scrape(BTreeMap<String, f64>);

impl Scrape {
    pub fn of(net: &Net, address: SocketAddr) -> Self {
        let (status, body) = get(net, address, "/metrics");
        assert_eq!(status, 200, "{body}");
        Self::parse(&body)
    }

    pub fn parse(text: &str) -> Self {
        let series = text.lines().filter(|line| !line.starts_with('#'));
        let series = series.map(|line| {
            let (name, value) = line.rsplit_once(' ').unwrap();
            (name.to_owned(), value.parse().unwrap())
        });
        let series: Vec<_> = series.collect();
        let all = series.len();
        let series: BTreeMap<_, _> = series.into_iter().collect();
        assert_eq!(all, series.len(), "a series stands there twice:\n{text}");
        Self(series)
    }

    #[track_caller]
    pub fn value(&self, series: &str) -> f64 {
        let value = self.0.get(series).copied();
        value.unwrap_or_else(|| panic!("no series {series} in {:#?}", self.0))
    }

    pub fn has(&self, series: &str) -> bool {
        self.0.contains_key(series)
    }

    /// Series that must not fall.
    pub fn counters(&self) -> impl Iterator<Item = (&str, f64)> {
        let is_counter = |(series, _): &(&String, &f64)| {
            let name = series.split('{').next().unwrap();
            ["_total", "_count", "_sum", "_bucket"]
                .iter()
                .any(|end| name.ends_with(end))
        };
        self.0
            .iter()
            .filter(is_counter)
            .map(|(series, value)| (series.as_str(), *value))
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }
}
