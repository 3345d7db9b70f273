//! The cards, the network outside of the machine that they are plugged into, and what is asked over it.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::run;
use crate::vm::image::{install, write};
use crate::vm::outside::{Namespace, bound, from_outside, inside};

/// The guarded port, and one that is not, of each protocol. Whoever sends there gets it back.
pub const TCP: [u16; 2] = [5432, 5433];
pub const UDP: [u16; 2] = [5434, 5435];

/// Longer than Linux waits before it sends a SYN again, twice.
pub const SILENCE: Duration = Duration::from_secs(4);

/// A card. Its name is that of the interface, of its driver and of QEMU's device.
pub struct Card {
    pub name: &'static str,
    device: &'static str,
    /// Which of the first two hosts of its networks.
    number: u8,
}

pub const CARDS: [Card; 4] = [
    Card {
        name: "virtio_net",
        // Queues for two processors, and as many again, which the driver wants for what the filter sends.
        device: "virtio-net-pci,mq=on,vectors=10",
        number: 1,
    },
    Card {
        name: "e1000e",
        device: "e1000e",
        number: 2,
    },
    Card {
        name: "igb",
        device: "igb",
        number: 3,
    },
    Card {
        name: "vmxnet3",
        device: "vmxnet3",
        number: 4,
    },
];

impl Card {
    fn address(&self, host: u8) -> [IpAddr; 2] {
        let v4 = Ipv4Addr::new(10, 78, self.number, host);
        let v6 = Ipv6Addr::new(0xfd78, self.number.into(), 0, 0, 0, 0, 0, host.into());
        [v4.into(), v6.into()]
    }

    pub fn host(&self) -> [IpAddr; 2] {
        self.address(1)
    }

    pub fn allowed(&self) -> [IpAddr; 2] {
        self.address(2)
    }

    pub fn denied(&self) -> [IpAddr; 2] {
        self.address(3)
    }

    /// QEMU's vmxnet3 loses them without the filter, too.
    pub fn carries_long_frames(&self) -> bool {
        self.name != "vmxnet3"
    }

    fn mac(&self) -> String {
        format!("52:54:00:78:00:{:02x}", self.number)
    }

    fn tap(&self) -> String {
        format!("tap{}", self.number)
    }

    fn queues(&self) -> Option<u8> {
        (self.name == "virtio_net").then_some(4)
    }

    pub fn arguments(&self) -> Vec<String> {
        let queues = self.queues().map(|queues| format!(",queues={queues}"));
        let (name, tap) = (self.name, self.tap());
        vec![
            "-netdev".into(),
            format!(
                "tap,id=net-{name},ifname={tap},script=no,downscript=no{}",
                queues.unwrap_or_default()
            ),
            "-device".into(),
            format!(
                "{},id={name},netdev=net-{name},mac={},romfile=",
                self.device,
                self.mac()
            ),
        ]
    }
}

/// The other ends of the cables, and a counter of what the guarded ports answer to the denied sources.
pub fn outside() -> Result<Namespace> {
    let namespace = Namespace::make()?;
    let mut rules = String::new();
    for card in &CARDS {
        let tap = card.tap();
        let queues = card.queues().map_or("", |_| " multi_queue");
        namespace.ip(&format!("tuntap add dev {tap} mode tap{queues}"))?;
        for (address, length) in [card.allowed(), card.denied()]
            .iter()
            .flat_map(|of| of.iter().zip([24, 64]))
        {
            let no_dad = if length == 64 { " nodad" } else { "" };
            namespace.ip(&format!("address add {address}/{length} dev {tap}{no_dad}"))?;
        }
        namespace.ip(&format!("link set {tap} up mtu 9000"))?;
        let [v4, v6] = card.denied();
        for protocol in [("tcp", TCP[0]), ("udp", UDP[0])] {
            let (protocol, port) = protocol;
            for of in [format!("ip daddr {v4}"), format!("ip6 daddr {v6}")] {
                rules += &format!("{of} {protocol} sport {port} counter name answers; ");
            }
        }
    }
    run(inside("nft").arg(format!(
        "table inet answers {{ counter answers {{ }}; chain input {{ \
         type filter hook input priority -300; {rules} }}; }}"
    )))?;
    Ok(namespace)
}

pub fn furnish(root: &Path, package: &Path) -> Result<()> {
    install(root, package)?;
    let mut policy = String::from("interfaces: [");
    let (mut rules, mut addresses) = (String::new(), String::new());
    for card in &CARDS {
        let name = card.name;
        policy += &format!("{name}, ");
        write(
            root,
            &format!("etc/systemd/network/10-{name}.link"),
            &format!("[Match]\nMACAddress={}\n[Link]\nName={name}\n", card.mac()),
        )?;
        // The shell is there before udev has named them.
        addresses += &format!("until [ -e /sys/class/net/{name} ]; do sleep 1; done\n");
        for (address, length) in card.host().iter().zip([24, 64]) {
            let no_dad = if length == 64 { " nodad" } else { "" };
            addresses += &format!("ip address add {address}/{length} dev {name}{no_dad}\n");
        }
        addresses += &format!("ip link set {name} up\n");
        for (address, length) in card.allowed().iter().zip([32, 128]) {
            rules += &format!("{{cidr: '{address}/{length}'}}, ");
        }
    }
    policy += "]\ndatabases:\n";
    for (name, port, protocol) in [("orders", TCP[0], "tcp"), ("datagrams", UDP[0], "udp")] {
        let force_tls = if protocol == "tcp" {
            ", force_tls: false"
        } else {
            ""
        };
        policy += &format!(
            "  - {{name: {name}, port: {port}, protocol: {protocol}, model: dedicated{force_tls}, rules: [{rules}]}}\n"
        );
    }
    write(root, "etc/filter-agent/policy.yaml", &policy)?;
    let mut servers = String::new();
    for port in TCP {
        servers +=
            &format!("socat TCP6-LISTEN:{port},ipv6only=0,reuseaddr,fork PIPE 2>/dev/null &\n");
    }
    for port in UDP {
        servers +=
            &format!("socat -b 65536 UDP6-RECVFROM:{port},ipv6only=0,fork PIPE 2>/dev/null &\n");
    }
    write(
        root,
        "root/network",
        // An interface that goes down keeps its addresses.
        &format!(
            "for of in all default; do echo 1 >/proc/sys/net/ipv6/conf/$of/keep_addr_on_down; done\n\
             {addresses}{servers}"
        ),
    )
}

/// Whether what is sent over a connection comes back, within that time.
pub fn echoes(source: IpAddr, to: SocketAddr, patience: Duration) -> Result<bool> {
    within(patience, move || {
        let mut stream = connect(source, to, SILENCE)?;
        stream.set_read_timeout(Some(SILENCE))?;
        let sent = [7; 20_000];
        stream.write_all(&sent)?;
        let mut returned = [0; 20_000];
        stream.read_exact(&mut returned)?;
        Ok(returned == sent)
    })
}

/// The same for a datagram of that length, in bytes.
pub fn echoes_datagram(
    source: IpAddr,
    to: SocketAddr,
    length: usize,
    patience: Duration,
) -> Result<bool> {
    within(patience, move || {
        let socket = UdpSocket::bind(SocketAddr::new(source, 0))?;
        socket.set_read_timeout(Some(SILENCE))?;
        socket.send_to(&vec![7; length], to)?;
        let mut returned = vec![0; length + 1];
        let (received, _) = socket.recv_from(&mut returned)?;
        Ok(received == length)
    })
}

/// Whether this succeeds, tried from outside until that time is over, and once at least.
fn within(
    patience: Duration,
    attempt: impl Fn() -> io::Result<bool> + Send + 'static,
) -> Result<bool> {
    from_outside(move || {
        let begin = Instant::now();
        loop {
            match attempt() {
                Ok(true) => return true,
                _ if begin.elapsed() >= patience => return false,
                _ => thread::sleep(Duration::from_millis(100)),
            }
        }
    })
}

pub fn connect(source: IpAddr, to: SocketAddr, timeout: Duration) -> io::Result<TcpStream> {
    let socket = bound(source)?;
    socket.connect_timeout(&to.into(), timeout)?;
    Ok(socket.into())
}
