use std::num::NonZeroI32;

use netlink_packet_core::DoneMessage;
use netlink_packet_sock_diag::{TCP_LISTEN, TCP_TIME_WAIT, inet::nlas::TcpInfo};

use super::*;

type Message = NetlinkMessage<SockDiagMessage>;

fn socket(local: &str, peer: &str, state: u8, inode: u32) -> Message {
    let (local, peer): (SocketAddr, SocketAddr) = (local.parse().unwrap(), peer.parse().unwrap());
    let socket_id = SocketId {
        source_port: local.port(),
        destination_port: peer.port(),
        source_address: local.ip(),
        destination_address: peer.ip(),
        interface_id: 0,
        cookie: [7; 8],
    };
    let mut info = TcpInfo::parse(&[0; 256]).unwrap();
    info.last_data_recv = 1_500;
    let header = InetResponseHeader {
        family: family(&socket_id),
        state,
        timer: None,
        socket_id,
        recv_queue: 0,
        send_queue: 0,
        uid: 0,
        inode,
    };
    let nlas = [Nla::TcpInfo(info)].into_iter().collect();
    SockDiagMessage::InetResponse(Box::new(InetResponse { header, nlas })).into()
}

fn held() -> Message {
    socket("10.0.0.1:5432", "10.0.0.2:40000", TCP_ESTABLISHED, 1)
}

fn done(code: i32) -> Message {
    let mut done = DoneMessage::default();
    done.code = code;
    Message::new(NetlinkHeader::default(), NetlinkPayload::Done(done))
}

fn error(errno: Errno) -> ErrorMessage {
    let mut error = ErrorMessage::default();
    error.code = NonZeroI32::new(-(errno as i32));
    error
}

fn interrupted(mut message: Message) -> Message {
    message.header.flags |= NLM_F_DUMP_INTR;
    message
}

fn datagram(messages: Vec<Message>) -> Vec<u8> {
    let mut datagram = Vec::new();
    for mut message in messages {
        message.finalize();
        let start = datagram.len();
        datagram.resize(start + message.buffer_len(), 0);
        message.serialize(&mut datagram[start..]);
    }
    datagram
}

fn read(datagram: &[u8]) -> Result<(bool, Vec<Connection>)> {
    let mut list = List {
        ports: &BTreeSet::from([5432]),
        connections: Vec::new(),
        listening: BTreeSet::new(),
    };
    let is_done = list.read(datagram)?;
    Ok((is_done, list.connections))
}

#[test]
fn only_connections_to_the_ports_that_a_process_holds_are_listed() {
    let messages = vec![
        socket("10.0.0.1:5432", "10.0.0.2:1", TCP_ESTABLISHED, 0),
        socket("[fd00::1]:5432", "[fd00::2]:2", TCP_CLOSE_WAIT, 0),
        socket(
            "[::ffff:10.0.0.1]:5432",
            "[::ffff:10.0.0.2]:3",
            TCP_FIN_WAIT2,
            1,
        ),
        socket("10.0.0.1:5433", "10.0.0.2:4", TCP_ESTABLISHED, 1),
        socket("10.0.0.1:5432", "10.0.0.2:5", TCP_FIN_WAIT1, 0),
        socket("10.0.0.1:5432", "10.0.0.2:6", TCP_FIN_WAIT2, 0),
        socket("10.0.0.1:5432", "10.0.0.2:7", TCP_TIME_WAIT, 0),
        socket("10.0.0.1:5432", "0.0.0.0:0", TCP_LISTEN, 1),
    ];
    let (is_done, listed) = read(&datagram(messages)).unwrap();
    assert!(!is_done);
    let ends = listed.iter().map(|c| format!("{} {}", c.local, c.peer));
    let expected = [
        "10.0.0.1:5432 10.0.0.2:1",
        "[fd00::1]:5432 [fd00::2]:2",
        "10.0.0.1:5432 10.0.0.2:3",
    ];
    assert_eq!(ends.collect::<Vec<_>>(), expected);
    assert!(
        listed
            .iter()
            .all(|c| c.idle == Some(Duration::from_millis(1_500)))
    );
    // As the kernel stores it, for `destroy`.
    assert_eq!(family(&listed[2].id), AF_INET6);
}

#[test]
fn list_that_is_not_whole_is_an_error() {
    let (is_done, listed) = read(&datagram(vec![held(), done(0)])).unwrap();
    assert!(is_done);
    assert_eq!(listed.len(), 1);
    let refused = NetlinkPayload::Error(error(Errno::ENOENT));
    for messages in [
        vec![interrupted(held()), done(0)],
        vec![held(), interrupted(done(0))],
        vec![held(), done(-(Errno::ENOMEM as i32))],
        vec![Message::new(NetlinkHeader::default(), refused)],
        vec![Message::new(
            NetlinkHeader::default(),
            NetlinkPayload::Overrun(Vec::new()),
        )],
    ] {
        read(&datagram(messages)).unwrap_err();
    }
    let whole = datagram(vec![held()]);
    for length in 1..whole.len() {
        read(&whole[..length]).unwrap_err();
    }
}

#[test]
fn many_ports_are_dumped_at_once_and_few_one_by_one() {
    let ports = |last| (1..=last).collect::<BTreeSet<u16>>();
    assert_eq!(dumped_ports(&ports(3)), [1, 2, 3]);
    assert_eq!(dumped_ports(&ports(MAX_PORT_DUMPS as u16)).len(), 16);
    assert_eq!(dumped_ports(&ports(MAX_PORT_DUMPS as u16 + 1)), [0]);
    assert_eq!(dumped_ports(&BTreeSet::new()), [0; 0]);
}

#[test]
fn refusal_to_destroy_is_an_error_and_a_connection_that_has_gone_is_none() {
    let result = |errno| destroyed(&error(errno)).ok();
    assert_eq!(
        destroyed(&ErrorMessage::default()).unwrap(),
        Destroyed::Ended
    );
    assert_eq!(result(Errno::ENOENT), Some(Destroyed::Gone));
    assert_eq!(result(Errno::ESTALE), Some(Destroyed::Gone));
    assert_eq!(result(Errno::EOPNOTSUPP), Some(Destroyed::Unsupported));
    assert_eq!(result(Errno::EPERM), None);
}
