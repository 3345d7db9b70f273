//! The host's network interfaces, as the kernel's route netlink reports them.

pub mod coverage;
pub mod driver;
pub mod nat;
pub mod settings;
pub mod sockets;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::unix::fs::MetadataExt as _,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use backon::{ConstantBuilder, Retryable as _};
use futures_util::{Stream, StreamExt as _, stream::BoxStream};
use ipnet::IpNet;
use netlink_packet_core::{NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST};
use nix::net::if_::if_nameindex;
use rtnetlink::{
    Handle, MulticastGroup, RouteMessageBuilder,
    packet_core::{NetlinkMessage, NetlinkPayload},
    packet_route::{
        RouteNetlinkMessage,
        address::{AddressAttribute, AddressMessage, AddressScope},
        link::{
            InfoPortKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage, LinkXdp,
            Prop, XdpAttached,
        },
        route::{RouteAttribute, RouteHeader, RouteMessage, RouteType},
    },
};

/// Dumps that the kernel may interrupt before the look is given up, and the pause between them. An
/// interface that comes or goes interrupts a dump; containers do that in bursts.
const MAX_INTERRUPTED: usize = 50;
const PAUSE: Duration = Duration::from_millis(20);

/// The host's own name.
pub fn name() -> String {
    let name = rustix::system::uname();
    name.nodename().to_string_lossy().into_owned()
}

/// The host's present life: the kernel's boot id and the network namespace, since containers share the former. The same as
/// long as the host runs, however often the agent is started. `None`: it cannot be read.
pub fn boot() -> Option<String> {
    let namespace = fs::metadata("/proc/self/ns/net").ok()?.ino();
    Some(format!("{}/{namespace}", crate::clock::boot_id()?))
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Interface {
    pub index: u32,
    pub name: String,
    /// Further names of the same interface (`ip link property add altname`).
    pub alternative_names: Vec<String>,
    /// As the device was made with, where the kernel keeps that apart from the one in use; a bond gives
    /// its own to the interfaces that belong to it. `02:00:00:00:00:01`.
    pub hardware_address: Option<String>,
    /// Whether its frames begin with an Ethernet header (ARPHRD_ETHER).
    pub ethernet: bool,
    pub up: bool,
    pub loopback: bool,
    /// Whether it belongs to a bridge, a bond or the like.
    pub has_master: bool,
    /// Whether that is a bridge, which may pass frames on to virtual machines.
    pub is_bridge_port: bool,
    /// Whether a default route of the main table leads through it to other hosts.
    pub default_route: bool,
    /// Of global scope: those by which other hosts may reach it.
    pub addresses: Vec<IpAddr>,
    /// The networks of these addresses.
    pub networks: Vec<IpNet>,
    pub xdp: Option<AttachedXdp>,
    /// Of a virtual interface: veth, bridge, ...
    pub kind: Option<String>,
    /// In bytes.
    pub mtu: u32,
    pub rx_queues: u32,
}

/// The XDP program that runs on an interface. Any process may have attached it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttachedXdp {
    pub native: bool,
    pub program_id: u32,
}

/// A dump during which the kernel's list changed: entries may be missing from it, or stand in it twice.
#[derive(Debug)]
struct Interrupted;

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the list changed each time while it was read: try again")
    }
}

impl std::error::Error for Interrupted {}

/// A route netlink socket to ask over.
pub struct Netlink {
    handle: Handle,
}

impl Netlink {
    /// # Errors
    /// No socket.
    pub fn connect() -> Result<Self> {
        // The end of each dump is reported, so that one cut short is noticed.
        let (mut connection, handle, _) =
            rtnetlink::new_connection().context("open a route netlink socket")?;
        connection.set_forward_done(true);
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    /// Every interface of this network namespace.
    ///
    /// # Errors
    /// No whole list: what cannot be seen must not be taken for what is not there.
    pub async fn interfaces(&self) -> Result<Vec<Interface>> {
        whole(|| list_interfaces(&self.handle)).await
    }

    /// The XDP programs that run, by interface index: what `interfaces` returns too, at less cost.
    ///
    /// # Errors
    /// As `interfaces`.
    pub async fn programs(&self) -> Result<BTreeMap<u32, AttachedXdp>> {
        whole(|| list_programs(&self.handle)).await
    }
}

/// `Netlink::interfaces`, over a socket for this once.
///
/// # Errors
/// As there.
pub async fn interfaces() -> Result<Vec<Interface>> {
    Netlink::connect()?.interfaces().await
}

/// Repeats a look that the kernel interrupted.
async fn whole<T, F: Future<Output = Result<T>>>(look: impl FnMut() -> F) -> Result<T> {
    let retries = ConstantBuilder::new()
        .with_delay(PAUSE)
        .with_max_times(MAX_INTERRUPTED);
    look.retry(retries)
        .sleep(tokio::time::sleep)
        .when(|error| error.is::<Interrupted>())
        .await
}

async fn list_interfaces(handle: &Handle) -> Result<Vec<Interface>> {
    let mut addresses: BTreeMap<u32, Vec<IpAddr>> = BTreeMap::new();
    let mut networks: BTreeMap<u32, Vec<IpNet>> = BTreeMap::new();
    for message in dump_addresses(handle)
        .await
        .context("list the host's addresses")?
    {
        if message.header.scope == AddressScope::Universe {
            let index = message.header.index;
            let address = local_address(&message);
            let network = address.and_then(|address| {
                let network = IpNet::new(address, message.header.prefix_len).ok()?;
                Some(network.trunc())
            });
            addresses.entry(index).or_default().extend(address);
            networks.entry(index).or_default().extend(network);
        }
    }
    let default_routes = default_routes(handle)
        .await
        .context("list the host's routes")?;
    let links = dump_links(handle)
        .await
        .context("list the host's interfaces")?;
    let interfaces = links.into_iter().map(|message| {
        let index = message.header.index;
        let mut interface = Interface {
            index,
            ethernet: message.header.link_layer_type == LinkLayerType::Ether,
            up: message.header.flags.contains(LinkFlags::Up),
            loopback: message.header.flags.contains(LinkFlags::Loopback),
            default_route: default_routes.contains(&index),
            addresses: addresses.remove(&index).unwrap_or_default(),
            networks: networks.remove(&index).unwrap_or_default(),
            ..Interface::default()
        };
        let (mut made_with, mut in_use) = (None, None);
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => interface.name = name,
                LinkAttribute::PropList(properties) => {
                    interface.alternative_names = alternative_names(properties);
                }
                LinkAttribute::PermAddress(bytes) => made_with = hardware_address(&bytes),
                LinkAttribute::Address(bytes) => in_use = hardware_address(&bytes),
                LinkAttribute::Controller(index) => interface.has_master = index != 0,
                LinkAttribute::Xdp(attributes) => interface.xdp = attached(&attributes),
                LinkAttribute::LinkInfo(infos) => {
                    interface.is_bridge_port =
                        infos.contains(&LinkInfo::PortKind(InfoPortKind::Bridge));
                    interface.kind = kind(&infos);
                }
                LinkAttribute::Mtu(mtu) => interface.mtu = mtu,
                LinkAttribute::NumRxQueues(queues) => interface.rx_queues = queues,
                _ => {}
            }
        }
        interface.hardware_address = made_with.or(in_use);
        interface
    });
    let mut interfaces: Vec<Interface> = interfaces.collect();
    // The netlink crates leave out an interface whose name is no UTF-8 text: it cannot be filtered, and databases may be
    // reachable through it all the same. Where names cannot be listed, as without a free descriptor, a later look warns of it:
    // what netlink lists must be checked meanwhile.
    let names = if_nameindex();
    let names = names.iter().flat_map(|names| names.iter());
    let unread = names.filter(|named| named.name().to_str().is_err());
    let unread = unread.map(|named| Interface {
        index: named.index(),
        name: named.name().to_bytes().escape_ascii().to_string(),
        up: true,
        addresses: addresses.remove(&named.index()).unwrap_or_default(),
        networks: networks.remove(&named.index()).unwrap_or_default(),
        ..Interface::default()
    });
    interfaces.extend(unread);
    Ok(interfaces)
}

async fn list_programs(handle: &Handle) -> Result<BTreeMap<u32, AttachedXdp>> {
    let links = dump_links(handle)
        .await
        .context("list the host's interfaces")?;
    let mut programs = BTreeMap::new();
    for message in links {
        let xdp = message
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                LinkAttribute::Xdp(attributes) => attached(attributes),
                _ => None,
            });
        programs.extend(xdp.map(|xdp| (message.header.index, xdp)));
    }
    Ok(programs)
}

async fn dump_addresses(handle: &Handle) -> Result<Vec<AddressMessage>> {
    let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    let entries = dump(handle, request).await?.into_iter();
    let addresses = entries.filter_map(|entry| match entry {
        RouteNetlinkMessage::NewAddress(address) => Some(address),
        _ => None,
    });
    Ok(addresses.collect())
}

async fn dump_links(handle: &Handle) -> Result<Vec<LinkMessage>> {
    let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let entries = dump(handle, request).await?.into_iter();
    let links = entries.filter_map(|entry| match entry {
        RouteNetlinkMessage::NewLink(link) => Some(link),
        _ => None,
    });
    Ok(links.collect())
}

async fn dump(handle: &Handle, request: RouteNetlinkMessage) -> Result<Vec<RouteNetlinkMessage>> {
    let mut request = NetlinkMessage::from(request);
    request.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    read_dump(handle.clone().request(request)?).await
}

/// The entries of a dump. The netlink crates report neither that it was interrupted (NLM_F_DUMP_INTR) nor
/// that it ended without its last message.
///
/// # Errors
/// A dump that is not whole; `Interrupted` where it is worth repeating.
async fn read_dump(
    messages: impl Stream<Item = NetlinkMessage<RouteNetlinkMessage>>,
) -> Result<Vec<RouteNetlinkMessage>> {
    let mut messages = std::pin::pin!(messages);
    let mut entries = Vec::new();
    let mut interrupted = false;
    while let Some(message) = messages.next().await {
        interrupted |= message.header.flags & NLM_F_DUMP_INTR != 0;
        match message.payload {
            NetlinkPayload::InnerMessage(entry) => entries.push(entry),
            NetlinkPayload::Done(done) => {
                ensure!(
                    done.code == 0,
                    "the kernel ended the list with error {}",
                    -done.code
                );
                ensure!(!interrupted, Interrupted);
                return Ok(entries);
            }
            NetlinkPayload::Error(error) => bail!("the kernel refuses: {error}"),
            // Packets were lost.
            NetlinkPayload::Overrun(_) => bail!(Interrupted),
            _ => {}
        }
    }
    bail!("the kernel's answer over netlink ended before it was whole")
}

/// On a point-to-point link `Address` is the peer's and `Local` the host's.
fn local_address(message: &AddressMessage) -> Option<IpAddr> {
    let find = |local: bool| {
        message
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                AddressAttribute::Local(address) if local => Some(*address),
                AddressAttribute::Address(address) if !local => Some(*address),
                _ => None,
            })
    };
    find(true).or_else(|| find(false))
}

fn alternative_names(properties: Vec<Prop>) -> Vec<String> {
    let names = properties
        .into_iter()
        .filter_map(|property| match property {
            Prop::AltIfName(name) => Some(name),
            _ => None,
        });
    names.collect()
}

/// `None` for a device without one, or with zeros only.
fn hardware_address(bytes: &[u8]) -> Option<String> {
    let is_set = bytes.iter().any(|&byte| byte != 0);
    let text = bytes.iter().map(|byte| format!("{byte:02x}"));
    is_set.then(|| text.collect::<Vec<_>>().join(":"))
}

/// Indexes of the interfaces that default routes lead through.
async fn default_routes(handle: &Handle) -> Result<BTreeSet<u32>> {
    let mut indexes = BTreeSet::new();
    let v4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
    let v6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
    for request in [v4, v6] {
        for entry in dump(handle, RouteNetlinkMessage::GetRoute(request)).await? {
            let RouteNetlinkMessage::NewRoute(route) = entry else {
                continue;
            };
            indexes.extend(led_through(&route));
        }
    }
    Ok(indexes)
}

/// Indexes of the interfaces that a route leads through, if it is a default route of the main table. Routes that lead
/// nowhere (unreachable, blackhole, prohibit) name the loopback interface, which nobody means by `default`.
fn led_through(route: &RouteMessage) -> Vec<u32> {
    let leads_on =
        route.header.kind == RouteType::Unicast && route.header.table == RouteHeader::RT_TABLE_MAIN;
    if !is_default(route) || !leads_on {
        return Vec::new();
    }
    let hops = route
        .attributes
        .iter()
        .flat_map(|attribute| match attribute {
            RouteAttribute::Oif(index) => vec![*index],
            RouteAttribute::MultiPath(hops) => hops.iter().map(|hop| hop.interface_index).collect(),
            _ => Vec::new(),
        });
    hops.collect()
}

fn is_default(route: &RouteMessage) -> bool {
    route.header.destination_prefix_length == 0
}

/// A stream that yields when an interface appears, vanishes or changes, or a default route does.
pub fn events() -> Result<BoxStream<'static, ()>> {
    let groups = [
        MulticastGroup::Link,
        MulticastGroup::Ipv4Route,
        MulticastGroup::Ipv6Route,
    ];
    let (connection, _, messages) = rtnetlink::new_multicast_connection(&groups)
        .context("listen for interfaces that come and go")?;
    tokio::spawn(connection);
    let concerns = |(message, _): (NetlinkMessage<RouteNetlinkMessage>, _)| async move {
        match message.payload {
            NetlinkPayload::InnerMessage(
                RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route),
            ) => is_default(&route).then_some(()),
            _ => Some(()),
        }
    };
    Ok(messages.filter_map(concerns).boxed())
}

fn kind(infos: &[LinkInfo]) -> Option<String> {
    infos.iter().find_map(|info| match info {
        LinkInfo::Kind(kind) => Some(kind.to_string()),
        _ => None,
    })
}

fn attached(attributes: &[LinkXdp]) -> Option<AttachedXdp> {
    let mode = attributes.iter().find_map(|attribute| match attribute {
        LinkXdp::Attached(XdpAttached::None) => None,
        LinkXdp::Attached(mode) => Some(*mode),
        _ => None,
    })?;
    let program_id = attributes.iter().find_map(|attribute| match attribute {
        LinkXdp::ProgId(id) => Some(*id),
        _ => None,
    });
    Some(AttachedXdp {
        native: mode != XdpAttached::SocketBuffer,
        program_id: program_id.unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use futures_util::stream;
    use netlink_packet_core::DoneMessage;

    use super::*;

    type Message = NetlinkMessage<RouteNetlinkMessage>;

    fn link() -> Message {
        RouteNetlinkMessage::NewLink(LinkMessage::default()).into()
    }

    fn done(code: i32) -> Message {
        let mut done = DoneMessage::default();
        done.code = code;
        Message::new(Default::default(), NetlinkPayload::Done(done))
    }

    fn interrupted(mut message: Message) -> Message {
        message.header.flags |= NLM_F_DUMP_INTR;
        message
    }

    fn read(messages: Vec<Message>) -> Result<usize> {
        let runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = { runtime }.build().unwrap();
        let entries = runtime.block_on(read_dump(stream::iter(messages)));
        entries.map(|entries| entries.len())
    }

    #[test]
    fn dump_that_is_not_whole_is_an_error() {
        assert_eq!(read(vec![link(), link(), done(0)]).unwrap(), 2);
        for messages in [
            vec![interrupted(link()), link(), done(0)],
            vec![link(), interrupted(done(0))],
        ] {
            assert!(read(messages).unwrap_err().is::<Interrupted>());
        }
        for messages in [vec![], vec![link()], vec![link(), done(-12)]] {
            assert!(!read(messages).unwrap_err().is::<Interrupted>());
        }
    }

    /// Fault B7: an unreachable default route stood for the loopback interface, which no policy can list.
    #[test]
    fn default_route_that_leads_nowhere_leads_through_no_interface() {
        let route = |kind| {
            let mut route = RouteMessageBuilder::<Ipv6Addr>::new()
                .output_interface(1)
                .build();
            route.header.kind = kind;
            led_through(&route)
        };
        assert_eq!(route(RouteType::Unicast), [1]);
        for kind in [
            RouteType::Unreachable,
            RouteType::BlackHole,
            RouteType::Prohibit,
        ] {
            assert_eq!(route(kind), [0; 0], "{kind:?}");
        }
    }

    #[test]
    fn interrupted_look_is_repeated_and_another_error_is_not() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        let looks = std::cell::Cell::new(0);
        let look = |error: fn() -> anyhow::Error| {
            looks.set(0);
            let looked = whole(|| async {
                looks.set(looks.get() + 1);
                if looks.get() < 4 {
                    Err(error())
                } else {
                    Ok(())
                }
            });
            (runtime.block_on(looked).is_ok(), looks.get())
        };
        let context = || anyhow::Error::from(Interrupted).context("list the host's interfaces");
        assert_eq!(look(context), (true, 4));
        assert_eq!(look(|| anyhow::anyhow!("refused")), (false, 1));
    }
}
