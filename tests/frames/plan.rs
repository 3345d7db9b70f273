//! A named list of frames to send.

/// What is sent to find out whether it is delivered: frames in order. Delivered means that UDP data
/// arrives that begins with the id (4 bytes, big endian), or that a SYN with the id as its sequence
/// number is answered.
#[derive(Clone, Debug)]
pub struct Plan {
    pub name: String,
    pub frames: Vec<Vec<u8>>,
}

pub(super) fn plan(name: impl Into<String>, frames: Vec<Vec<u8>>) -> Plan {
    Plan {
        name: name.into(),
        frames,
    }
}
