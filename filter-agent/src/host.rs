//! The host's network interfaces, as the kernel's route netlink tells them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use anyhow::{Context as _, Result};
use futures_util::{StreamExt as _, TryStreamExt as _, stream::BoxStream};
use rtnetlink::{
    Handle, MulticastGroup, RouteMessageBuilder,
    packet_core::{NetlinkMessage, NetlinkPayload},
    packet_route::{
        RouteNetlinkMessage,
        address::{AddressAttribute, AddressScope},
        link::{LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkXdp, XdpAttached},
        route::{RouteAttribute, RouteHeader, RouteMessage},
    },
};

#[derive(Clone, Debug, Default)]
pub struct Interface {
    pub index: u32,
    pub name: String,
    /// Whether its frames begin with an Ethernet header (ARPHRD_ETHER).
    pub ethernet: bool,
    pub up: bool,
    pub loopback: bool,
    /// Whether it belongs to a bridge, a bond or the like.
    pub has_master: bool,
    /// Whether a default route of the main table leads through it.
    pub default_route: bool,
    /// Of global scope: those by which other hosts may reach it.
    pub addresses: Vec<IpAddr>,
    pub xdp: Option<AttachedXdp>,
    /// Of a virtual interface: veth, bridge, ...
    pub kind: Option<String>,
    /// In bytes.
    pub mtu: u32,
    pub rx_queues: u32,
}

/// The XDP program that runs on an interface, whoever attached it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttachedXdp {
    pub native: bool,
    pub program_id: u32,
}

/// Every interface of this network namespace.
pub async fn interfaces() -> Result<Vec<Interface>> {
    let (connection, handle, _) =
        rtnetlink::new_connection().context("open a route netlink socket")?;
    tokio::spawn(connection);
    let mut addresses: BTreeMap<u32, Vec<IpAddr>> = BTreeMap::new();
    let mut messages = handle.address().get().execute();
    while let Some(message) = messages
        .try_next()
        .await
        .context("list the host's addresses")?
    {
        if message.header.scope == AddressScope::Universe {
            // On a point-to-point link `Address` is the peer's and `Local` the host's.
            let local = message
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    AddressAttribute::Local(address) => Some(*address),
                    _ => None,
                });
            let address = local.or_else(|| {
                message
                    .attributes
                    .iter()
                    .find_map(|attribute| match attribute {
                        AddressAttribute::Address(address) => Some(*address),
                        _ => None,
                    })
            });
            addresses
                .entry(message.header.index)
                .or_default()
                .extend(address);
        }
    }
    let default_routes = default_routes(&handle).await?;
    let mut interfaces = Vec::new();
    let mut messages = handle.link().get().execute();
    while let Some(message) = messages
        .try_next()
        .await
        .context("list the host's interfaces")?
    {
        let index = message.header.index;
        let mut interface = Interface {
            index,
            ethernet: message.header.link_layer_type == LinkLayerType::Ether,
            up: message.header.flags.contains(LinkFlags::Up),
            loopback: message.header.flags.contains(LinkFlags::Loopback),
            default_route: default_routes.contains(&index),
            addresses: addresses.remove(&index).unwrap_or_default(),
            ..Interface::default()
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => interface.name = name,
                LinkAttribute::Controller(index) => interface.has_master = index != 0,
                LinkAttribute::Xdp(attributes) => interface.xdp = attached(&attributes),
                LinkAttribute::LinkInfo(infos) => interface.kind = kind(&infos),
                LinkAttribute::Mtu(mtu) => interface.mtu = mtu,
                LinkAttribute::NumRxQueues(queues) => interface.rx_queues = queues,
                _ => {}
            }
        }
        interfaces.push(interface);
    }
    Ok(interfaces)
}

/// The programs that run, by interface index: what `interfaces` tells too, at less cost.
pub async fn programs() -> Result<BTreeMap<u32, AttachedXdp>> {
    let (connection, handle, _) =
        rtnetlink::new_connection().context("open a route netlink socket")?;
    tokio::spawn(connection);
    let mut programs = BTreeMap::new();
    let mut messages = handle.link().get().execute();
    while let Some(message) = messages
        .try_next()
        .await
        .context("list the host's interfaces")?
    {
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

/// Indexes of the interfaces that default routes lead through.
async fn default_routes(handle: &Handle) -> Result<BTreeSet<u32>> {
    let mut indexes = BTreeSet::new();
    let v4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
    let v6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
    for request in [v4, v6] {
        let mut messages = handle.route().get(request).execute();
        while let Some(route) = messages
            .try_next()
            .await
            .context("list the host's routes")?
        {
            if is_default(&route) && route.header.table == RouteHeader::RT_TABLE_MAIN {
                for attribute in &route.attributes {
                    match attribute {
                        RouteAttribute::Oif(index) => indexes.extend([*index]),
                        RouteAttribute::MultiPath(hops) => {
                            indexes.extend(hops.iter().map(|hop| hop.interface_index));
                        }
                        _ => {}
                    }
                }
            }
        }
    }
    Ok(indexes)
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
