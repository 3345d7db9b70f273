//! TCP clients made of crafted segments. The client's kernel does not have their addresses, so it neither resets their
//! connections nor answers for them.

use std::{
    cell::RefCell,
    net::{IpAddr, SocketAddr},
    sync::atomic::{AtomicU16, Ordering},
    thread,
    time::{Duration, Instant},
};

use filter_common::Protocol;

use crate::{
    frames::{Addressing, Packet, transport_checksum},
    net::{
        addresses::{CLIENT_MAC, DB_MAC, DB4, DB6},
        hosts::Net,
        wire::Wire,
    },
};

/// Limit of every wait for a segment that must come.
const PATIENCE: Duration = Duration::from_secs(10);
/// A port that no test listens on: the host answers each SYN with a reset.
const CLOSED_PORT: u16 = 1;

pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const PSH: u8 = 8;
pub const ACK: u8 = 16;
pub const URG: u8 = 32;

/// A TCP segment (RFC 9293 section 3.1), without its ports.
#[derive(Clone, Debug)]
pub struct Segment {
    pub sequence: u32,
    pub acknowledgement: u32,
    pub flags: u8,
    pub window: u16,
    pub urgent: u16,
    /// Padded to words with end-of-options.
    pub options: Vec<u8>,
    pub data: Vec<u8>,
    pub checksum: Checksum,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksum {
    Right,
    /// By one bit, and not that of the pseudo-header either.
    Wrong,
    /// Without the segment, as a sender has it that leaves the rest to its network card: wrong on a wire.
    OfPseudoHeader,
}

impl Segment {
    fn bytes(&self, addressing: &Addressing) -> Vec<u8> {
        let mut options = self.options.clone();
        options.resize(options.len().next_multiple_of(4), 0);
        let mut bytes = addressing.source_port.to_be_bytes().to_vec();
        bytes.extend(addressing.destination_port.to_be_bytes());
        bytes.extend(self.sequence.to_be_bytes());
        bytes.extend(self.acknowledgement.to_be_bytes());
        bytes.extend([(5 + options.len() as u8 / 4) << 4, self.flags]);
        bytes.extend(self.window.to_be_bytes());
        bytes.extend([0, 0]);
        bytes.extend(self.urgent.to_be_bytes());
        bytes.extend(&options);
        bytes.extend(&self.data);
        let right = transport_checksum(addressing, &bytes);
        let of_pseudo_header = !transport_checksum(addressing, &vec![0; bytes.len()]);
        let sum = match self.checksum {
            Checksum::Right => right,
            Checksum::Wrong if right ^ 1 == of_pseudo_header => right ^ 2,
            Checksum::Wrong => right ^ 1,
            Checksum::OfPseudoHeader => of_pseudo_header,
        };
        bytes[16..18].copy_from_slice(&sum.to_be_bytes());
        bytes
    }
}

/// A segment from the server.
#[derive(Clone, Debug)]
pub struct Received {
    pub from: SocketAddr,
    /// The client's port.
    pub to: u16,
    pub sequence: u32,
    pub acknowledgement: u32,
    pub flags: u8,
    pub window: u16,
    pub options: Vec<u8>,
    pub data: Vec<u8>,
}

impl Received {
    pub fn has(&self, flags: u8) -> bool {
        self.flags & flags == flags
    }

    /// `None` if the frame is no TCP segment, or for another address.
    fn read(frame: &[u8], client: IpAddr) -> Option<Self> {
        let packet = frame.get(14..)?;
        let (source, destination, end, at): (IpAddr, IpAddr, usize, usize) = match packet[0] >> 4 {
            4 if packet[9] == 6 => (
                <[u8; 4]>::try_from(&packet[12..16]).ok()?.into(),
                <[u8; 4]>::try_from(&packet[16..20]).ok()?.into(),
                u16::from_be_bytes([packet[2], packet[3]]).into(),
                usize::from(packet[0] & 15) * 4,
            ),
            6 if packet[6] == 6 => (
                <[u8; 16]>::try_from(&packet[8..24]).ok()?.into(),
                <[u8; 16]>::try_from(&packet[24..40]).ok()?.into(),
                40 + usize::from(u16::from_be_bytes([packet[4], packet[5]])),
                40,
            ),
            _ => return None,
        };
        let tcp = packet.get(at..end).filter(|_| destination == client)?;
        let data = usize::from(tcp[12] >> 4) * 4;
        let word = |at: usize| u32::from_be_bytes([tcp[at], tcp[at + 1], tcp[at + 2], tcp[at + 3]]);
        let half = |at: usize| u16::from_be_bytes([tcp[at], tcp[at + 1]]);
        Some(Self {
            from: SocketAddr::new(source, half(0)),
            to: half(2),
            sequence: word(4),
            acknowledgement: word(8),
            flags: tcp[13],
            window: half(14),
            options: tcp[20..data].to_vec(),
            data: tcp[data..].to_vec(),
        })
    }
}

/// A host of clients made of crafted segments, at one address.
pub struct RawClient {
    wire: Wire,
    pub address: IpAddr,
    pub server: IpAddr,
    received: RefCell<Vec<Received>>,
}

impl RawClient {
    pub fn send_frame(&self, frame: &[u8]) {
        self.wire.send(frame);
    }

    /// The packet that carries a segment between these ports.
    pub fn packet(&self, from: u16, to: u16, segment: &Segment) -> Packet {
        let addressing = Addressing {
            source_mac: CLIENT_MAC,
            destination_mac: DB_MAC,
            source: self.address,
            destination: self.server,
            source_port: from,
            destination_port: to,
            protocol: Protocol::Tcp,
        };
        let bytes = segment.bytes(&addressing);
        let mut packet = Packet::new(&addressing, segment.sequence);
        packet.segment = bytes;
        packet
    }

    /// A client port that was not used before, by any client of this process.
    pub fn new_port(&self) -> u16 {
        static NEXT: AtomicU16 = AtomicU16::new(0);
        NEXT.fetch_add(1, Ordering::Relaxed) % 60_000 + 5_000
    }

    /// A connection that has sent nothing yet.
    pub fn connection(&self, to: u16) -> RawConnection<'_> {
        self.connection_from(self.new_port(), to)
    }

    pub fn connection_from(&self, from: u16, to: u16) -> RawConnection<'_> {
        RawConnection {
            client: self,
            from,
            to,
            isn: fastrand::u32(..),
            server_isn: 0,
        }
    }

    /// An established connection: the third segment is an empty ACK.
    pub fn open(&self, to: u16) -> RawConnection<'_> {
        let mut connection = self.connection(to);
        connection.open();
        connection
    }

    /// Takes the first segment that came and is wanted. Those before it that are not are kept.
    pub fn take(&self, mut wanted: impl FnMut(&Received) -> bool) -> Option<Received> {
        let mut received = self.received.borrow_mut();
        while let Some(frame) = self.wire.receive() {
            received.extend(Received::read(&frame, self.address));
        }
        let at = received.iter().position(&mut wanted)?;
        Some(received.remove(at))
    }

    /// Waits for a segment.
    #[track_caller]
    pub fn wait(&self, mut wanted: impl FnMut(&Received) -> bool) -> Received {
        let received = self.wait_for(PATIENCE, &mut wanted);
        received.unwrap_or_else(|| {
            let others = self.received.borrow();
            let last = &others[others.len().saturating_sub(5)..];
            panic!("the server does not answer; other segments: {last:?}")
        })
    }

    pub fn wait_for(
        &self,
        patience: Duration,
        mut wanted: impl FnMut(&Received) -> bool,
    ) -> Option<Received> {
        let deadline = Instant::now() + patience;
        loop {
            let late = Instant::now() > deadline;
            match self.take(&mut wanted) {
                Some(received) => return Some(received),
                None if late => return None,
                None => thread::sleep(Duration::from_micros(200)),
            }
        }
    }

    /// Forgets what came and was not taken.
    pub fn forget(&self) {
        self.take(|_| false);
        self.received.borrow_mut().clear();
    }

    /// Waits until the server's host has dealt with all that was sent before: it resets a connection to a closed port.
    #[track_caller]
    pub fn fence(&self) {
        self.fence_at(CLOSED_PORT);
    }

    /// The same with a closed port of a host behind the server's, to which this port leads.
    #[track_caller]
    pub fn fence_at(&self, port: u16) {
        let mut connection = self.connection(port);
        let answer = connection.ask();
        assert!(answer.has(RST), "{answer:?}");
    }
}

/// A connection of such a client.
pub struct RawConnection<'a> {
    client: &'a RawClient,
    pub from: u16,
    pub to: u16,
    pub isn: u32,
    /// Of the last SYN-ACK that `ask` took.
    pub server_isn: u32,
}

impl RawConnection<'_> {
    /// An empty segment with the ACK flag, at the beginning of the stream.
    pub fn segment(&self) -> Segment {
        Segment {
            sequence: self.isn.wrapping_add(1),
            acknowledgement: self.server_isn.wrapping_add(1),
            flags: ACK,
            window: 0xffff,
            urgent: 0,
            options: vec![],
            data: vec![],
            checksum: Checksum::Right,
        }
    }

    pub fn syn(&self) -> Segment {
        Segment {
            sequence: self.isn,
            acknowledgement: 0,
            flags: SYN,
            // Maximum segment size.
            options: vec![2, 4, 5, 180],
            ..self.segment()
        }
    }

    /// Data at an offset of the stream.
    pub fn data(&self, place: u32, data: &[u8]) -> Segment {
        Segment {
            sequence: self.isn.wrapping_add(1).wrapping_add(place),
            flags: PSH | ACK,
            data: data.to_vec(),
            ..self.segment()
        }
    }

    pub fn packet(&self, segment: &Segment) -> Packet {
        self.client.packet(self.from, self.to, segment)
    }

    pub fn send(&self, segment: &Segment) {
        self.client.send_frame(&self.packet(segment).frame());
    }

    /// Sends data at an offset of the stream, in segments that a link takes.
    pub fn write(&self, place: u32, data: &[u8]) {
        for (number, part) in data.chunks(1400).enumerate() {
            self.send(&self.data(place + number as u32 * 1400, part));
        }
    }

    /// Whether a segment is for this connection.
    pub fn is_mine(&self, received: &Received) -> bool {
        received.to == self.from && received.from == SocketAddr::new(self.client.server, self.to)
    }

    /// Sends a SYN and takes the answer to it.
    #[track_caller]
    pub fn ask(&mut self) -> Received {
        self.ask_with(&self.syn())
    }

    #[track_caller]
    pub fn ask_with(&mut self, syn: &Segment) -> Received {
        self.send(syn);
        let answers =
            |received: &Received| self.is_mine(received) && received.flags & (SYN | RST) != 0;
        let answer = self.client.wait(answers);
        self.server_isn = answer.sequence;
        answer
    }

    #[track_caller]
    pub fn open(&mut self) {
        let answer = self.ask();
        assert!(answer.has(SYN | ACK), "{answer:?}");
        self.send(&self.segment());
    }

    /// Ends the connection, if the server has it.
    pub fn reset(&self, place: u32) {
        self.send(&Segment {
            flags: RST | ACK,
            ..self.data(place, &[])
        });
    }
}

impl Net {
    /// The far end of the link as clients made by hand, at an address that the client's kernel must not have.
    pub fn raw_client(&self, address: IpAddr) -> RawClient {
        let server = if address.is_ipv4() {
            DB4.into()
        } else {
            DB6.into()
        };
        self.fix_neighbours();
        RawClient {
            wire: self.wire(),
            address,
            server,
            received: RefCell::default(),
        }
    }
}
