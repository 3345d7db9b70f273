//! The host's network interfaces, as the kernel's route netlink tells them.

use std::{collections::BTreeMap, net::IpAddr};

use anyhow::{Context as _, Result};
use futures_util::TryStreamExt as _;
use rtnetlink::packet_route::{
    address::{AddressAttribute, AddressScope},
    link::{LinkAttribute, LinkFlags, LinkLayerType, LinkXdp, XdpAttached},
};

#[derive(Clone, Debug)]
pub struct Interface {
    pub index: u32,
    pub name: String,
    /// Whether its frames begin with an Ethernet header (ARPHRD_ETHER).
    pub ethernet: bool,
    pub up: bool,
    pub loopback: bool,
    /// Whether it belongs to a bridge, a bond or the like.
    pub has_master: bool,
    /// Of global scope: those by which other hosts may reach it.
    pub addresses: Vec<IpAddr>,
    pub xdp: Option<AttachedXdp>,
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
            name: String::new(),
            ethernet: message.header.link_layer_type == LinkLayerType::Ether,
            up: message.header.flags.contains(LinkFlags::Up),
            loopback: message.header.flags.contains(LinkFlags::Loopback),
            has_master: false,
            addresses: addresses.remove(&index).unwrap_or_default(),
            xdp: None,
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => interface.name = name,
                LinkAttribute::Controller(index) => interface.has_master = index != 0,
                LinkAttribute::Xdp(attributes) => interface.xdp = attached(&attributes),
                _ => {}
            }
        }
        interfaces.push(interface);
    }
    Ok(interfaces)
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
