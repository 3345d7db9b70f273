//! Where TLS begins in a connection with a PROXY header: behind it.

use aya_ebpf::bindings::__sk_buff;

use crate::{
    judgement::JudgementPointer,
    proxy::{self, Found, Header},
    socket::{Segment, is_intact},
};

/// Where data begins: so many bytes into a segment, at this place of the stream, or of what is behind its header.
#[derive(Clone, Copy)]
pub struct Place {
    pub skip: u32,
    pub place: u32,
}

/// Content of a segment in a stream that begins with a PROXY header.
pub enum Behind {
    /// Nothing but the header.
    Nothing,
    Opening(Place),
    /// It has to come again, whole or in its order.
    Unclear,
    NoHeader,
}

/// Finds what comes behind the PROXY header, which has to be the first that is let pass, in one segment.
#[inline(always)]
pub fn behind_header(
    skb: *mut __sk_buff,
    engine: u32,
    segment: &Segment,
    from: Place,
    judgement: JudgementPointer,
) -> Behind {
    let length = segment.length - from.skip;
    let header = if from.place == 0 {
        match proxy::find(skb, engine, segment.data + from.skip, length) {
            Found::Header(_) if is_intact(skb) == 0 => return Behind::Unclear,
            Found::Header(found) if judgement.set_header(found) == found.word() => found,
            Found::Header(_) | Found::Cut => return Behind::Unclear,
            Found::Nothing => return Behind::NoHeader,
        }
    } else {
        match Header::of(judgement.header()) {
            Some(header) if from.place >= header.length() => header,
            // Refused before.
            None if judgement.forms().is_none() => return Behind::NoHeader,
            _ => return Behind::Unclear,
        }
    };
    if from.place >= header.length() {
        let place = from.place - header.length();
        return Behind::Opening(Place { place, ..from });
    }
    if length == header.length() {
        return Behind::Nothing;
    }
    Behind::Opening(Place {
        skip: from.skip + header.length(),
        place: 0,
    })
}
