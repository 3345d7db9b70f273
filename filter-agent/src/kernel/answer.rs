//! The error that a client receives that does not begin with TLS, in its engine's protocol. Pure.

use filter_common::{ANSWER_LENGTH, Answer, Engine};

const NOTHING: Answer = Answer {
    length: 0,
    bytes: [0; ANSWER_LENGTH],
};

/// Returns an engine's answer. All have one length, padded with spaces, so that the packet path builds one
/// kind of packet.
pub fn answer(engine: Engine) -> Answer {
    match engine {
        // "Message Formats": ErrorResponse; invalid_authorization_specification.
        Engine::Postgresql => framed(
            &[
                &[b'E', 0, 0, 0, ANSWER_LENGTH as u8 - 1],
                &b"SFATAL\0VFATAL\0C28000\0M"[..],
            ]
            .concat(),
            "TLS is required here, whatever the server would accept (sslmode=require)",
            b"\0\0",
        ),
        // "ERR_Packet": ER_SECURE_TRANSPORT_REQUIRED, after the client's packet number 1.
        Engine::Mysql => framed(
            &[
                &[ANSWER_LENGTH as u8 - 4, 0, 0, 2, 0xff],
                &3159_u16.to_le_bytes()[..],
                b"#HY000",
            ]
            .concat(),
            "TLS is required here, whatever the server would accept (--ssl-mode=REQUIRED)",
            b"",
        ),
        Engine::Redis => framed(
            b"-ERR ",
            "TLS is required here, whatever the server would accept (--tls)",
            b"\r\n",
        ),
        // A MongoDB driver ignores a reply that carries no number of a request of its own.
        Engine::Mongodb | Engine::Other => NOTHING,
    }
}

fn framed(before: &[u8], text: &str, after: &[u8]) -> Answer {
    let mut bytes = [b' '; ANSWER_LENGTH];
    let text = [before, text.as_bytes()].concat();
    bytes[..text.len()].copy_from_slice(&text);
    bytes[ANSWER_LENGTH - after.len()..].copy_from_slice(after);
    Answer {
        length: ANSWER_LENGTH as u32,
        bytes,
    }
}
