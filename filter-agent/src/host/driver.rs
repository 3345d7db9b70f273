//! Examines the drivers of interfaces: native XDP, MTU, offloads, and whether the filter may run natively.

use std::{collections::BTreeMap, fs, io, path::Path};

use anyhow::{Context as _, Result, ensure};
use ethtool::{EthtoolAttr, EthtoolFeatureAttr};
use futures_util::{StreamExt as _, TryStreamExt as _};
use netlink_packet_core::{
    DecodeError, Emitable, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
    NlasIterator, ParseableParametrized, parse_u32, parse_u64,
};
use netlink_packet_generic::{GenlFamily, GenlHeader, GenlMessage};
use serde::Serialize;

use crate::{
    host::{AttachedXdp, Interface},
    policy::Mode,
};

/// Drivers with native XDP in every kernel that the filter runs on, for kernels before 6.3, which do
/// not report it (from the drivers' `ndo_bpf`, and bcc's list of features by kernel version).
const NATIVE: [&str; 22] = [
    "bnxt_en",
    "bond",
    "dpaa2-eth",
    "ena",
    "hv_netvsc",
    "i40e",
    "ice",
    "igb",
    "igc",
    "ixgbe",
    "ixgbevf",
    "mana",
    "mlx4_en",
    "mlx5_core",
    "mvneta",
    "nfp",
    "qede",
    "sfc",
    "stmmac",
    "tun",
    "veth",
    "virtio_net",
];

/// Drivers that attach a program without interrupting the link. Others recreate their queues, and some renegotiate the
/// link.
const SEAMLESS: [&str; 4] = ["bond", "tun", "veth", "virtio_net"];

/// Drivers on which the filter must not run natively, by the names that sysfs has, and why. The kernel reports a program as attached
/// that they do not run.
///
/// vmxnet3 does so in `vmxnet3_rq_cleanup_all`, which changes of MTU and rings go through as well (tried on Linux 6.12: `cargo xtask
/// vm --drivers`). xen-netfront, whose name on the Xen bus is vif, does so in `xennet_xdp_set` where the backend leaves no room in
/// front of packets, and in `xennet_create_queues` after a migration (by reading it).
const UNRELIABLE: [(&str, &str); 3] = [
    (
        "vmxnet3",
        "forgets a native program when the interface goes down",
    ),
    ("vif", XEN),
    ("xen-netfront", XEN),
];
const XEN: &str =
    "takes a native program that it may not run, and forgets it when the machine is moved";

/// Largest MTU, in bytes, whose frames fit a page of 4,096 beside the headroom of XDP (256), the
/// Ethernet header (14) and `skb_shared_info` (320): what a driver without XDP frags can take.
const PAGE_MTU: u32 = 4096 - 256 - 14 - 320;

/// Bits of a virtio network device's features (virtio 1.2, section 5.1.3).
const VIRTIO_CTRL_GUEST_OFFLOADS: usize = 2;
const VIRTIO_GUEST_OFFLOADS: [usize; 5] = [1, 7, 8, 9, 10];

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Driver {
    pub interface: String,
    /// The kernel's driver, or the kind of a virtual interface.
    pub driver: String,
    /// Whether it runs XDP natively, where that is known.
    pub native: Option<bool>,
    /// In bytes.
    pub mtu: u32,
    pub rx_queues: u32,
    /// Effects of attaching the filter that the operator should know.
    pub notes: Vec<String>,
    /// Why the filter cannot be attached in the mode of the policy.
    pub error: Option<String>,
}

/// Properties of an interface that route netlink does not report.
#[derive(Clone, Copy, Default)]
struct Features {
    /// Of NETDEV_CMD_DEV_GET (kernel 6.3).
    xdp: Option<u64>,
    lro: bool,
    /// GRO in hardware.
    gro: bool,
}

const NETDEV_XDP_ACT_BASIC: u64 = 1;
const NETDEV_XDP_ACT_RX_SG: u64 = 32;

/// Examines interfaces without touching them.
pub async fn drivers(
    interfaces: &[Interface],
    mode: impl Fn(&Interface) -> Mode,
) -> Result<Vec<Driver>> {
    // Neither netlink family is essential: without one the report has less detail.
    let xdp = xdp_features().await.unwrap_or_default();
    let mut drivers = Vec::new();
    for interface in interfaces {
        let mut features = offloads(&interface.name).await.unwrap_or_default();
        features.xdp = xdp.get(&interface.index).copied();
        drivers.push(Driver::of(interface, mode(interface), features));
    }
    Ok(drivers)
}

impl Driver {
    fn of(interface: &Interface, mode: Mode, features: Features) -> Self {
        let name = &interface.name;
        let device = Path::new(INTERFACES).join(name).join("device");
        let driver = of_device(&device)
            .ok()
            .flatten()
            .or_else(|| interface.kind.clone())
            .unwrap_or_else(|| "unknown".into());
        let known = NATIVE.contains(&driver.as_str());
        let native = match features.xdp {
            Some(features) => Some(features & NETDEV_XDP_ACT_BASIC != 0),
            None => known.then_some(true),
        };
        let frags = features.xdp.map(|xdp| xdp & NETDEV_XDP_ACT_RX_SG != 0);
        let virtio = fs::read_to_string(device.join("features")).unwrap_or_default();
        let unreliable = unreliable(interface);
        let refusal = if native == Some(false) {
            Some(format!("{driver} has no native XDP"))
        } else if unreliable.is_some() {
            unreliable.clone()
        } else if interface.mtu > PAGE_MTU && frags == Some(false) {
            Some(format!(
                "{driver} supports no frame larger than a page with native XDP: MTU {} is more than \
                 {PAGE_MTU}",
                interface.mtu
            ))
        } else if driver == "virtio_net" && keeps_offloads(&virtio) {
            Some(
                "virtio_net refuses native XDP: the hypervisor merges packets, and this guest cannot \
                 switch that off"
                    .into(),
            )
        } else {
            None
        };
        let mut notes = Vec::new();
        let mut error = None;
        // It stays so until it is detached, whatever the mode.
        if interface.xdp.is_some_and(|xdp| xdp.native)
            && let Some(reason) = &unreliable
        {
            error = Some(not_reliable(name, reason));
        }
        match (mode, refusal) {
            (Mode::Generic, _) => {
                if features.lro {
                    notes.push("lro is on: the kernel switches it off for generic XDP".into());
                }
            }
            (Mode::Native, Some(refusal)) => {
                error = Some(format!(
                    "{name}: {refusal}, and the policy says `mode: native`"
                ));
            }
            (Mode::Auto, Some(refusal)) => {
                notes.push(format!("{refusal}: the filter will run in generic mode"));
            }
            (Mode::Auto | Mode::Native, None) => {
                if native.is_none() {
                    notes.push(format!(
                        "this kernel does not report whether {driver} has native XDP (6.3 and newer \
                         do): attaching the filter shows it"
                    ));
                }
                let offloads = [(features.lro, "lro"), (features.gro, "rx-gro-hw")];
                for (_, offload) in offloads.iter().filter(|(on, _)| *on) {
                    notes.push(format!(
                        "{offload} is on, with which drivers refuse native XDP or switch it off: \
                         `ethtool -K {name} {offload} off`"
                    ));
                }
                if !SEAMLESS.contains(&driver.as_str()) {
                    notes.push(
                        "attaching in native mode recreates the queues: the link may be down once for a \
                         moment"
                            .into(),
                    );
                }
            }
        }
        Self {
            interface: name.clone(),
            driver,
            native,
            mtu: interface.mtu,
            rx_queues: interface.rx_queues,
            notes,
            error,
        }
    }
}

/// Where sysfs has the interfaces.
const INTERFACES: &str = "/sys/class/net";

/// The name of a device's driver. `None`: the interface is virtual, and has no device.
fn of_device(device: &Path) -> io::Result<Option<String>> {
    match fs::read_link(device.join("driver")) {
        Ok(driver) => {
            let name = driver.file_name().unwrap_or_default();
            Ok(Some(name.to_string_lossy().into_owned()))
        }
        // `bonding_masters` lies among the interfaces and is a file.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Why the filter must not run natively on an interface: the driver is not reliable, or unknown. Any interface of the host may
/// become a port of a bond.
pub fn unreliable(interface: &Interface) -> Option<String> {
    let drivers = match interface.kind.as_deref() {
        Some("bond") => all_drivers(),
        // The kernel makes these itself.
        Some(_) => return None,
        None => driver_of(interface).map(|driver| driver.into_iter().collect()),
    };
    match drivers {
        Ok(drivers) => reason(&drivers),
        Err(error) => Some(format!("its driver is unknown: {error:#}")),
    }
}

fn reason(drivers: &[String]) -> Option<String> {
    let mut reasons = UNRELIABLE.iter();
    let (driver, reason) = reasons.find(|(driver, _)| drivers.iter().any(|it| it == driver))?;
    Some(format!("{driver} {reason}"))
}

/// # Errors
/// sysfs is not there, or shows another network namespace, or the interface was renamed meanwhile.
fn driver_of(interface: &Interface) -> Result<Option<String>> {
    let folder = Path::new(INTERFACES).join(&interface.name);
    let path = folder.join("ifindex");
    let index = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    ensure!(
        index.trim() == interface.index.to_string(),
        "{} is of another interface",
        folder.display()
    );
    let driver = of_device(&folder.join("device"));
    driver.with_context(|| format!("read the driver of {}", interface.name))
}

/// Of every interface of the host.
fn all_drivers() -> Result<Vec<String>> {
    let list = || format!("list {INTERFACES}");
    let mut drivers = Vec::new();
    for entry in fs::read_dir(INTERFACES).with_context(list)? {
        let path = entry.with_context(list)?.path();
        let driver = of_device(&path.join("device"));
        drivers.extend(driver.with_context(|| format!("read the driver of {}", path.display()))?);
    }
    Ok(drivers)
}

/// Interfaces that the program with this id runs on natively.
fn natively_filtered(host: &[Interface], program_id: u32) -> impl Iterator<Item = &Interface> {
    host.iter().filter(move |interface| {
        let ours = |xdp: AttachedXdp| xdp.native && xdp.program_id == program_id;
        interface.xdp.is_some_and(ours)
    })
}

/// Errors of interfaces that the program with this id runs on natively although their driver is not reliable: an agent before 0.2.0
/// attached it, or they joined a bond. Whether they are filtered cannot be seen.
pub fn unreliably_filtered(host: &[Interface], program_id: u32) -> Vec<String> {
    natively_filtered(host, program_id)
        .filter_map(|interface| Some(not_reliable(&interface.name, &unreliable(interface)?)))
        .collect()
}

fn not_reliable(name: &str, reason: &str) -> String {
    format!(
        "interface {name} may not be filtered: {reason}; run `filter-agent detach`, and start the agent again, which then filters \
         in generic mode"
    )
}

/// Warnings of interfaces that are filtered natively, and lose the frames of all connections that do not fit a page.
pub fn long_frame_warnings(host: &[Interface], program_id: u32) -> Vec<String> {
    let release = rustix::system::uname();
    let release = release.release().to_string_lossy();
    natively_filtered(host, program_id)
        .filter_map(|interface| {
            let driver = driver_of(interface).ok().flatten()?;
            loses_long_frames(&driver, interface.mtu, &release).then(|| {
                let name = &interface.name;
                format!(
                    "{name} has an MTU of {}, and {driver} loses frames of more than {PAGE_MTU} bytes in native mode: set a \
                     smaller one, or `mode: generic` for it after `filter-agent detach`",
                    interface.mtu
                )
            })
        })
        .collect()
}

/// virtio_net looks at the MTU when a program is attached, and not when the MTU is raised after that. It hands the program
/// frames of several pages from Linux 6.3 on; before, it drops them.
fn loses_long_frames(driver: &str, mtu: u32, release: &str) -> bool {
    let mut numbers = release.split(['.', '-']).map_while(|it| it.parse().ok());
    let version: Option<(u32, u32)> = numbers.next().zip(numbers.next());
    driver == "virtio_net" && mtu > PAGE_MTU && version.is_some_and(|version| version < (6, 3))
}

/// Whether a virtio device merges packets and its guest cannot switch that off: without VIRTIO_NET_F_CTRL_GUEST_OFFLOADS the
/// driver refuses native XDP with EOPNOTSUPP. `bits`: as in sysfs, a
/// digit for each feature.
fn keeps_offloads(bits: &str) -> bool {
    let has = |bit: usize| bits.as_bytes().get(bit) == Some(&b'1');
    !has(VIRTIO_CTRL_GUEST_OFFLOADS) && VIRTIO_GUEST_OFFLOADS.into_iter().any(has)
}

/// Returns which offloads that conflict with XDP are on.
async fn offloads(interface: &str) -> Result<Features> {
    let (connection, mut handle, _) =
        ethtool::new_connection().context("open an ethtool socket")?;
    tokio::spawn(connection);
    let mut feature = handle.feature();
    let replies = feature.get(Some(interface)).execute().await;
    let replies = replies.with_context(|| format!("ask for the offloads of {interface}"))?;
    let replies: Vec<_> = replies.try_collect().await?;
    let mut features = Features::default();
    let attributes = replies.iter().flat_map(|reply| &reply.payload.nlas);
    for attribute in attributes {
        if let EthtoolAttr::Feature(EthtoolFeatureAttr::Active(active)) = attribute {
            let on = |name: &str| active.iter().any(|bit| bit.name == name && bit.value);
            features.lro = on("rx-lro");
            features.gro = on("rx-gro-hw");
        }
    }
    Ok(features)
}

/// The message of the generic netlink family `netdev` with the XDP features of drivers.
#[derive(Debug, Default)]
struct Netdev {
    interface: u32,
    xdp_features: u64,
}

const NETDEV_CMD_DEV_GET: u8 = 1;
const NETDEV_A_DEV_IFINDEX: u16 = 1;
const NETDEV_A_DEV_XDP_FEATURES: u16 = 3;

impl GenlFamily for Netdev {
    fn family_name() -> &'static str {
        "netdev"
    }

    fn command(&self) -> u8 {
        NETDEV_CMD_DEV_GET
    }

    fn version(&self) -> u8 {
        1
    }
}

/// A request for all interfaces has no attributes.
impl Emitable for Netdev {
    fn buffer_len(&self) -> usize {
        0
    }

    fn emit(&self, _buffer: &mut [u8]) {}
}

impl ParseableParametrized<[u8], GenlHeader> for Netdev {
    fn parse_with_param(bytes: &[u8], _header: GenlHeader) -> Result<Self, DecodeError> {
        let mut netdev = Self::default();
        for attribute in NlasIterator::new(bytes) {
            let attribute = attribute?;
            match attribute.kind() {
                NETDEV_A_DEV_IFINDEX => netdev.interface = parse_u32(attribute.value())?,
                NETDEV_A_DEV_XDP_FEATURES => netdev.xdp_features = parse_u64(attribute.value())?,
                _ => {}
            }
        }
        Ok(netdev)
    }
}

/// Returns the XDP features of each interface, by the interface's index.
///
/// # Errors
/// The kernel is older than 6.3 and does not report them.
async fn xdp_features() -> Result<BTreeMap<u32, u64>> {
    let (connection, mut handle, _) =
        genetlink::new_connection().context("open a generic netlink socket")?;
    tokio::spawn(connection);
    let mut request = NetlinkMessage::from(GenlMessage::from_payload(Netdev::default()));
    // The kernel does not mark these replies as one of many; only an acknowledgement keeps the
    // library from taking the first for the last.
    request.header.flags = NLM_F_REQUEST | NLM_F_DUMP | NLM_F_ACK;
    let replies = handle.request(request).await;
    let mut replies = replies.context("ask for the interfaces' XDP features")?;
    let mut features = BTreeMap::new();
    while let Some(reply) = replies.next().await {
        let reply = reply.context("read the interfaces' XDP features")?;
        if let NetlinkPayload::InnerMessage(message) = reply.payload {
            let Netdev {
                interface,
                xdp_features,
            } = message.payload;
            features.insert(interface, xdp_features);
        }
    }
    Ok(features)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nic(mtu: u32) -> Interface {
        Interface {
            name: "no-such-nic".into(),
            kind: Some("ena".into()),
            mtu,
            ..Interface::default()
        }
    }

    /// A denied source was connected after `ip link set down` and `up`.
    #[test]
    fn driver_that_forgets_its_program_is_not_used_natively() {
        let reason = |drivers: &[&str]| {
            let drivers: Vec<String> = drivers.iter().map(|it| (*it).to_owned()).collect();
            reason(&drivers)
        };
        let forgets = "vmxnet3 forgets a native program when the interface goes down";
        assert_eq!(reason(&["vmxnet3"]).as_deref(), Some(forgets));
        assert_eq!(reason(&["igb", "vmxnet3"]).as_deref(), Some(forgets));
        assert!(reason(&["vif"]).unwrap().starts_with("vif takes"));
        assert_eq!(reason(&["igb", "virtio_net"]), None);
        assert_eq!(reason(&[]), None);
    }

    #[test]
    fn unknown_driver_is_not_used_natively() {
        let interface = |name: &str, index, kind: Option<&str>| Interface {
            name: name.into(),
            index,
            kind: kind.map(str::to_owned),
            ..Interface::default()
        };
        let missing = unreliable(&interface("gone0", 7, None)).unwrap();
        assert!(missing.starts_with("its driver is unknown: read /sys/class/net/gone0/ifindex"));
        let other = unreliable(&interface("lo", 4_000_000_000, None)).unwrap();
        assert!(other.ends_with("/sys/class/net/lo is of another interface"));
        assert_eq!(unreliable(&interface("gone0", 7, Some("veth"))), None);
        let native = AttachedXdp {
            native: true,
            program_id: 9,
        };
        let filtered = Interface {
            xdp: Some(native),
            ..interface("gone0", 7, None)
        };
        let filtered = [filtered];
        assert_eq!(unreliably_filtered(&filtered, 9).len(), 1);
        assert!(unreliably_filtered(&filtered, 8).is_empty());
    }

    /// A raised MTU under the filter lost the long frames of every connection, and nothing said so.
    #[test]
    fn raised_mtu_that_the_driver_does_not_look_at_is_told_of() {
        let loses = loses_long_frames;
        assert!(loses("virtio_net", 9000, "6.1.0-56-cloud-amd64"));
        assert!(loses("virtio_net", 3507, "5.18.0"));
        assert!(!loses("virtio_net", 3506, "6.1.0"));
        assert!(!loses("virtio_net", 9000, "6.3.0-rc1"));
        assert!(!loses("virtio_net", 9000, "6.12.117+deb12-amd64"));
        assert!(!loses("virtio_net", 9000, "unknown"));
        assert!(!loses("veth", 9000, "6.1.0"));
    }

    #[test]
    fn driver_without_frags_is_told_of_at_an_mtu_beyond_a_page() {
        let features = Features {
            xdp: Some(NETDEV_XDP_ACT_BASIC),
            ..Features::default()
        };
        let refusal = "ena supports no frame larger than a page with native XDP: MTU 9001 is more than \
                       3506";
        let auto = Driver::of(&nic(9001), Mode::Auto, features);
        assert_eq!(
            auto.notes,
            [format!("{refusal}: the filter will run in generic mode")]
        );
        assert_eq!(auto.error, None);
        let native = Driver::of(&nic(9001), Mode::Native, features);
        let expected = format!("no-such-nic: {refusal}, and the policy says `mode: native`");
        assert_eq!(native.error, Some(expected));
        let frags = Features {
            xdp: Some(NETDEV_XDP_ACT_BASIC | NETDEV_XDP_ACT_RX_SG),
            ..features
        };
        for (mtu, mode, features) in [
            (3506, Mode::Native, features),
            (9001, Mode::Generic, features),
            (9001, Mode::Native, frags),
        ] {
            let driver = Driver::of(&nic(mtu), mode, features);
            assert_eq!(driver.error, None);
            assert!(!driver.notes.join("; ").contains("MTU"));
        }
    }

    #[test]
    fn driver_is_known_where_the_kernel_does_not_tell() {
        let features = Features::default();
        let driver = Driver::of(&nic(1500), Mode::Auto, features);
        assert_eq!(driver.native, Some(true));
        assert!(driver.notes.join("; ").contains("recreates the queues"));
        let mut unknown = nic(1500);
        unknown.kind = Some("frobnic".into());
        let driver = Driver::of(&unknown, Mode::Auto, features);
        assert_eq!(driver.native, None);
        assert!(driver.notes[0].starts_with("this kernel does not report whether frobnic"));
    }

    #[test]
    fn offloads_that_refuse_native_mode_are_told_of() {
        let features = Features {
            lro: true,
            gro: true,
            ..Features::default()
        };
        let told = Driver::of(&nic(1500), Mode::Auto, features)
            .notes
            .join("; ");
        assert!(told.contains("`ethtool -K no-such-nic lro off`"), "{told}");
        assert!(
            told.contains("`ethtool -K no-such-nic rx-gro-hw off`"),
            "{told}"
        );
    }

    #[test]
    fn virtio_device_that_merges_and_cannot_be_told_not_to_is_recognised() {
        assert!(keeps_offloads("1101"));
        assert!(!keeps_offloads("1111"));
        assert!(!keeps_offloads("1001"));
        assert!(!keeps_offloads(""));
    }
}
