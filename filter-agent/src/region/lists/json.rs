//! Parses JSON of publishers into values, within bounds. Pure.

use std::{cell::Cell, fmt};

use anyhow::{Context as _, Result};
use serde::de::{self, DeserializeSeed, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::region::lists::quoted;

/// Memory that the values of a list may take, in bytes: a hundred thousand entries with four fields each. Text of a few
/// bytes can become an object of hundreds.
const MAX_MEMORY: usize = 96 << 20;

/// Estimated memory of values, in bytes, on the allocator's smallest blocks.
const BLOCK: usize = 32;
const ELEMENT: usize = 2 * size_of::<Value>();
/// A node of an object's B-tree: place for eleven members, of which six are used when keys come in order.
const NODE: usize = 11 * (size_of::<String>() + size_of::<Value>()) + 32;
const MEMBERS_OF_NODE: usize = 6;

/// Parses a whole text.
///
/// # Errors
/// It is not JSON, an object has a key twice, or its values take too much memory.
pub(super) fn parse(body: &[u8]) -> Result<Value> {
    let room = Cell::new(MAX_MEMORY);
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let value = Bounded(&room)
        .deserialize(&mut deserializer)
        .and_then(|value| deserializer.end().map(|()| value));
    value.with_context(|| {
        let begins = quoted(body.trim_ascii_start());
        format!("read JSON (it begins with {begins})")
    })
}

fn of_text(text: &str) -> usize {
    BLOCK.max(text.len() + 16)
}

/// Makes values whose objects have each key once (of two the parser would keep the last, and lose what the first has),
/// as long as there is room.
#[derive(Clone, Copy)]
struct Bounded<'a>(&'a Cell<usize>);

impl Bounded<'_> {
    fn take<E: de::Error>(self, bytes: usize) -> Result<(), E> {
        let left = self.0.get().checked_sub(bytes);
        let left = left.ok_or_else(|| {
            let most = MAX_MEMORY >> 20;
            E::custom(format!(
                "its values take more than {most} MiB of memory: use a shorter list, or one that is text"
            ))
        })?;
        self.0.set(left);
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for Bounded<'_> {
    type Value = Value;

    fn deserialize<D: de::Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Bounded<'_> {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("JSON")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Value, E> {
        self.take(of_text(value))?;
        Ok(value.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = elements.next_element_seed(self)? {
            // The first makes room for four.
            self.take(if values.is_empty() { 4 } else { 1 } * ELEMENT)?;
            values.push(value);
        }
        Ok(values.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = members.next_key::<String>()? {
            if object.contains_key(&key) {
                let key = quoted(key.as_bytes());
                return Err(de::Error::custom(format!(
                    "the key {key} stands twice in an object"
                )));
            }
            let node = if object.len().is_multiple_of(MEMBERS_OF_NODE) {
                NODE
            } else {
                0
            };
            self.take(node + of_text(&key))?;
            object.insert(key, members.next_value_seed(self)?);
        }
        Ok(object.into())
    }
}
