//! What etcd says of itself.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
};

use anyhow::{Context as _, Result, ensure};
use filter_tests::etcd::Etcd;

/// Totals since etcd's start, and its memory now.
pub struct Load {
    /// Seconds.
    pub processor: f64,
    /// Bytes.
    pub resident: f64,
    /// Bytes of its database on disk.
    pub database: f64,
    pub transactions: f64,
    pub renewals: f64,
    /// Writes of its log to disk, and the seconds that they took.
    pub syncs: f64,
    pub sync_time: f64,
}

impl Load {
    pub fn of(etcd: &Etcd) -> Result<Self> {
        let text = etcd.namespace.run(metrics)?;
        let sum = |beginning: &str| {
            let lines = text.lines().filter(|line| line.starts_with(beginning));
            let values = lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
            values.sum()
        };
        let load = Self {
            processor: sum("process_cpu_seconds_total"),
            resident: sum("process_resident_memory_bytes"),
            database: sum("etcd_mvcc_db_total_size_in_bytes"),
            transactions: calls(&text, "grpc_server_handled_total", "Txn"),
            renewals: calls(&text, "grpc_server_msg_received_total", "LeaseKeepAlive"),
            syncs: sum("etcd_disk_wal_fsync_duration_seconds_count"),
            sync_time: sum("etcd_disk_wal_fsync_duration_seconds_sum"),
        };
        ensure!(
            load.processor > 0.0 && load.syncs > 0.0,
            "no metrics: {text}"
        );
        Ok(load)
    }
}

/// A counter of one of etcd's methods, of all results.
fn calls(text: &str, counter: &str, method: &str) -> f64 {
    let method = format!("grpc_method=\"{method}\"");
    let lines = text.lines();
    let lines = lines.filter(|line| line.starts_with(counter) && line.contains(&method));
    let values = lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
    values.sum()
}

fn metrics() -> Result<String> {
    let mut stream = TcpStream::connect(Etcd::without_tls(0)).context("connect to etcd")?;
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}
