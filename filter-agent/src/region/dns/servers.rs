//! The name servers that a look-up queries: those of the policy, or of `/etc/resolv.conf`.

use std::{
    collections::BTreeMap,
    future::Future,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use hickory_resolver::{
    NameServerPool, PoolContext, TlsConfig,
    config::{ConnectionConfig, NameServerConfig, ResolverOpts},
    net::{
        runtime::{
            RuntimeProvider, TokioHandle, TokioRuntimeProvider, TokioTime,
            iocompat::AsyncIoTokioAsStd,
        },
        xfer::RetryDnsHandle,
    },
    proto::op::DnsRequestOptions,
};
use resolv_conf::ScopedIp;
use tokio::net::{TcpSocket, TcpStream, UdpSocket};

use crate::{
    policy::{Dns, Nameserver, Transport},
    region::tls,
    threads,
};

const SYSTEM: &str = "/etc/resolv.conf";

/// Makes the client of the name servers, and the options of each query. Each look-up makes its own: `/etc/resolv.conf` may
/// have changed. hickory's `Resolver` is not used: it follows aliases without checking that they belong to the queried
/// name.
pub(super) async fn client(
    dns: &Dns,
    timeout: Duration,
) -> Result<(
    RetryDnsHandle<NameServerPool<ScopedRuntime>>,
    DnsRequestOptions,
)> {
    let (nameservers, mut options) = if dns.nameservers.is_empty() {
        let read = threads::run(&threads::LOOK_UPS, Path::new(SYSTEM), || {
            Ok(std::fs::read(SYSTEM)?)
        });
        let text = read.await.with_context(|| format!("read {SYSTEM}"))?;
        system(&text).with_context(|| format!("read {SYSTEM}"))?
    } else {
        (dns.nameservers.clone(), ResolverOpts::default())
    };
    // A silent server or a lost packet leaves time for others.
    options.timeout = timeout / 4;
    let mut query = DnsRequestOptions::default();
    query.recursion_desired = options.recursion_desired;
    query.use_edns = options.edns0;
    query.edns_payload_len = options.edns_payload_len;
    query.edns_set_dnssec_ok = dns.dnssec;
    let encrypted = nameservers.iter().any(|n| n.transport != Transport::Plain);
    let config = if encrypted {
        tls::client(dns.ca_file.as_deref()).await?
    } else {
        tls::none()?
    };
    let attempts = options.attempts;
    let tls = TlsConfig { config };
    let context = Arc::new(PoolContext::new(options, tls));
    let scoped = nameservers
        .iter()
        .filter_map(|server| Some((server.address, server.interface.clone()?)));
    let runtime = ScopedRuntime {
        runtime: TokioRuntimeProvider::default(),
        interfaces: Arc::new(scoped.collect()),
    };
    let servers = nameservers.iter().map(name_server);
    let pool = NameServerPool::from_config(servers.collect::<Vec<_>>(), context, runtime);
    Ok((RetryDnsHandle::new(pool, attempts), query))
}

/// Reads the name servers of `resolv.conf`, and the options that matter to a look-up of an absolute name. Everything else
/// is ignored, right or wrong: the host's own resolver ignores it, too.
///
/// # Errors
/// Name servers are listed, and none of them can be queried.
fn system(text: &[u8]) -> Result<(Vec<Nameserver>, ResolverOpts)> {
    // One byte that is not UTF-8 would take the rest of its line for an error.
    let text = String::from_utf8_lossy(text);
    let (config, errors) = resolv_conf::Config::parse_with_errors(text.as_bytes());
    let listed = config.nameservers.iter().map(|address| {
        let (address, interface) = match address {
            ScopedIp::V4(address) => (IpAddr::V4(*address), None),
            ScopedIp::V6(address, interface) => (IpAddr::V6(*address), interface.clone()),
        };
        Nameserver {
            address,
            interface,
            port: None,
            transport: Transport::Plain,
        }
    });
    let mut nameservers: Vec<Nameserver> = listed.collect();
    nameservers.retain(|server| !server.lacks_interface());
    if nameservers.is_empty() {
        let is_one = |line: &str| line.split_whitespace().next() == Some("nameserver");
        if text.lines().any(is_one) {
            let error = errors.first().map(|error| format!(": {error}"));
            bail!(
                "none of its name servers is an address that can be queried{}",
                error.unwrap_or_default()
            );
        }
        // resolv.conf(5): without any, it is the name server of this machine.
        nameservers.push(Nameserver {
            address: Ipv4Addr::LOCALHOST.into(),
            interface: None,
            port: None,
            transport: Transport::Plain,
        });
    }
    let mut options = ResolverOpts::default();
    options.attempts = usize::try_from(config.attempts).unwrap_or(usize::MAX);
    options.edns0 = config.edns0;
    Ok((nameservers, options))
}

fn name_server(server: &Nameserver) -> NameServerConfig {
    let mut connections = match &server.transport {
        Transport::Plain => vec![ConnectionConfig::udp(), ConnectionConfig::tcp()],
        Transport::Tls { name } => vec![ConnectionConfig::tls(name.as_str().into())],
        Transport::Https { name, path } => {
            let path = Some(path.as_str().into());
            vec![ConnectionConfig::https(name.as_str().into(), path)]
        }
    };
    for connection in &mut connections {
        connection.port = server.port.unwrap_or(connection.port);
    }
    NameServerConfig::new(server.address, true, connections)
}

/// Sockets to name servers, bound to the interface of a link-local address: hickory keeps addresses without their scope.
#[derive(Clone)]
pub(super) struct ScopedRuntime {
    runtime: TokioRuntimeProvider,
    interfaces: Arc<BTreeMap<IpAddr, String>>,
}

impl ScopedRuntime {
    fn interface(&self, server: SocketAddr) -> Option<String> {
        self.interfaces.get(&server.ip()).cloned()
    }
}

type Made<T> = Pin<Box<dyn Send + Future<Output = io::Result<T>>>>;

impl RuntimeProvider for ScopedRuntime {
    type Handle = TokioHandle;
    type Timer = TokioTime;
    type Udp = UdpSocket;
    type Tcp = AsyncIoTokioAsStd<TcpStream>;

    fn create_handle(&self) -> Self::Handle {
        self.runtime.create_handle()
    }

    fn connect_tcp(
        &self,
        server: SocketAddr,
        local: Option<SocketAddr>,
        timeout: Option<Duration>,
    ) -> Made<Self::Tcp> {
        let Some(interface) = self.interface(server) else {
            return self.runtime.connect_tcp(server, local, timeout);
        };
        Box::pin(async move {
            let socket = TcpSocket::new_v6()?;
            socket.bind_device(Some(interface.as_bytes()))?;
            socket.set_nodelay(true)?;
            let timeout = timeout.unwrap_or(Duration::from_secs(5));
            let connected = tokio::time::timeout(timeout, socket.connect(server)).await;
            Ok(AsyncIoTokioAsStd(
                connected.map_err(|_| io::ErrorKind::TimedOut)??,
            ))
        })
    }

    fn bind_udp(&self, local: SocketAddr, server: SocketAddr) -> Made<Self::Udp> {
        let interface = self.interface(server);
        let bound = self.runtime.bind_udp(local, server);
        Box::pin(async move {
            let socket = bound.await?;
            socket.bind_device(interface.as_deref().map(str::as_bytes))?;
            Ok(socket)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(text: &[u8]) -> Result<Vec<String>> {
        let (servers, _) = system(text)?;
        let spelled = servers.iter().map(|server| match &server.interface {
            Some(interface) => format!("{}%{interface}", server.address),
            None => server.address.to_string(),
        });
        Ok(spelled.collect())
    }

    #[test]
    fn name_servers_are_found_whatever_else_is_wrong() {
        let cases: [(&[u8], &[&str]); 6] = [
            (
                b"nameserver 192.0.2.1\nnameserver 2001:db8::1\n",
                &["192.0.2.1", "2001:db8::1"],
            ),
            (
                b"search a..b \xff\noptions ndots:x\nnonsense\nnameserver 192.0.2.1 # comment",
                &["192.0.2.1"],
            ),
            (b"nameserver 192.0.2\nnameserver 192.0.2.1", &["192.0.2.1"]),
            (
                b"nameserver fe80::1%eth0\nnameserver fe80::2",
                &["fe80::1%eth0"],
            ),
            (b"", &["127.0.0.1"]),
            (b"search example.net\n", &["127.0.0.1"]),
        ];
        for (text, expected) in cases {
            let text_shown = String::from_utf8_lossy(text);
            assert_eq!(addresses(text).unwrap(), expected, "{text_shown}");
        }
    }

    #[test]
    fn name_servers_of_which_none_can_be_queried_are_an_error() {
        for text in [
            "nameserver fe80::2\n",
            "nameserver 192.0.2\n",
            "nameserver\n",
        ] {
            let error = format!("{:#}", addresses(text.as_bytes()).unwrap_err());
            assert!(error.contains("none of its name servers"), "{error}");
        }
    }
}
