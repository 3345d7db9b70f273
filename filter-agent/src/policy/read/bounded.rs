//! YAML that others wrote, as a value of bounded size: an alias may stand for much more than its few characters, and
//! aliases of aliases for more than there is memory.

use std::{cell::Cell, fmt};

use serde::{
    Deserializer,
    de::{self, DeserializeSeed, EnumAccess, Error as _, MapAccess, SeqAccess, Visitor},
};
use serde_yaml::{Mapping, Value};

/// Reads a text whose nodes have at most so many bytes together, those of aliases counted each time; a node has one more
/// than its text.
///
/// # Errors
/// The text is not YAML, is larger, or has a tag or a key twice.
pub(super) fn value(text: &str, most: usize) -> Result<Value, serde_yaml::Error> {
    let left = Cell::new(most);
    Bounded { left: &left }.deserialize(serde_yaml::Deserializer::from_str(text))
}

#[derive(Clone, Copy)]
struct Bounded<'a> {
    left: &'a Cell<usize>,
}

impl Bounded<'_> {
    fn take<E: de::Error>(self, bytes: usize) -> Result<(), E> {
        let left = self.left.get().checked_sub(bytes + 1);
        let left =
            left.ok_or_else(|| E::custom("its aliases stand for more than a document may hold"))?;
        self.left.set(left);
        Ok(())
    }

    fn node<E: de::Error>(self, value: impl Into<Value>) -> Result<Value, E> {
        self.take(0)?;
        Ok(value.into())
    }
}

impl<'de> DeserializeSeed<'de> for Bounded<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Bounded<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value without a tag")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Value, E> {
        self.node(Value::Null)
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Value, E> {
        self.node(value)
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Value, E> {
        self.node(value)
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Value, E> {
        self.node(value)
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
        self.node(value)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Value, E> {
        self.take(text.len())?;
        Ok(text.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        self.take(0)?;
        let mut values = Vec::new();
        while let Some(value) = seq.next_element_seed(self)? {
            values.push(value);
        }
        Ok(Value::Sequence(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        self.take(0)?;
        let mut values = Mapping::new();
        loop {
            let key = Key {
                bounded: self,
                before: &values,
            };
            let Some(key) = map.next_key_seed(key)? else {
                return Ok(Value::Mapping(values));
            };
            let value = map.next_value_seed(self)?;
            values.insert(Value::String(key), value);
        }
    }

    fn visit_enum<A: EnumAccess<'de>>(self, _: A) -> Result<Value, A::Error> {
        Err(A::Error::custom("tags are not allowed"))
    }
}

/// A key of a mapping. Fails at one that was there before: there the error has its line.
struct Key<'a> {
    bounded: Bounded<'a>,
    before: &'a Mapping,
}

impl<'de> DeserializeSeed<'de> for Key<'_> {
    type Value = String;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<String, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Key<'_> {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name of a field")
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<String, E> {
        self.bounded.take(name.len())?;
        if self.before.contains_key(name) {
            return Err(E::custom(format!("duplicate field `{name}`")));
        }
        Ok(name.to_owned())
    }
}
