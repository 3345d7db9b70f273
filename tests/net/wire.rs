//! Frames on the link, as they are sent and received.

use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::{
    errno::Errno,
    ifaddrs::getifaddrs,
    sys::socket::{
        AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, bind, recvfrom, setsockopt,
        socket, sockopt,
    },
    unistd::write,
};

use crate::net::wait::wait_until;

/// Packet type of frames that this host sent (packet(7)).
const PACKET_OUTGOING: u8 = 4;

/// A packet socket: frames as they are on the wire, both ways.
pub struct Wire {
    socket: OwnedFd,
}

impl Wire {
    pub(super) fn open(interface: &str) -> Self {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let protocol = SockProtocol::EthAll;
        let socket = socket(AddressFamily::Packet, SockType::Raw, flags, protocol).unwrap();
        // The one safe way to a link-layer address that names the interface.
        let address = getifaddrs()
            .unwrap()
            .filter(|found| found.interface_name == interface)
            .find_map(|found| found.address?.as_link_addr().copied())
            .expect("the interface has a link-layer address");
        bind(socket.as_raw_fd(), &address).unwrap();
        setsockopt(&socket, sockopt::RcvBufForce, &(64 << 20)).unwrap();
        Self { socket }
    }

    pub fn send(&self, frame: &[u8]) {
        // Refused while the device's queue is full.
        let sent = wait_until(|| match write(&self.socket, frame) {
            Ok(_) => true,
            Err(Errno::ENOBUFS | Errno::EAGAIN) => false,
            Err(error) => panic!("send a frame of {} bytes: {error}", frame.len()),
        });
        assert!(sent, "the wire takes no frame");
    }

    /// The first 64 KiB of the next frame that arrived, if one did.
    pub fn receive(&self) -> Option<Vec<u8>> {
        let mut frame = vec![0; 1 << 16];
        loop {
            match recvfrom::<LinkAddr>(self.socket.as_raw_fd(), &mut frame) {
                Ok((length, address)) => {
                    // The socket sees its own frames too.
                    if address.is_some_and(|from| from.pkttype() != PACKET_OUTGOING) {
                        frame.truncate(length);
                        return Some(frame);
                    }
                }
                Err(Errno::EAGAIN) => return None,
                Err(error) => panic!("receive a frame: {error}"),
            }
        }
    }
}
