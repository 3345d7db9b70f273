//! Line numbers of a policy file's nodes.

use std::fmt;

use serde::{
    Deserializer,
    de::{self, DeserializeSeed, MapAccess, SeqAccess, Visitor},
};

/// One step on the way to a node of the file.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Step {
    Key(String),
    Index(usize),
}

/// Returns the line of a node in the file, or of the key that leads to it.
///
/// serde_yaml reports lines in errors only: this deserializer walks to the node and fails there on purpose.
pub(super) fn locate(text: &str, path: &[Step], of_key: bool) -> Option<usize> {
    let walk = Walk { path, of_key };
    let found = walk.deserialize(serde_yaml::Deserializer::from_str(text));
    found.err()?.location().map(|location| location.line())
}

#[derive(Clone, Copy)]
struct Walk<'a> {
    path: &'a [Step],
    of_key: bool,
}

impl<'de> DeserializeSeed<'de> for Walk<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Walk<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the node to locate")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        if let Some((Step::Key(wanted), path)) = self.path.split_first() {
            let key = Key {
                wanted,
                fail: self.of_key && path.is_empty(),
            };
            while let Some(found) = map.next_key_seed(key)? {
                if found {
                    return map.next_value_seed(Walk { path, ..self });
                }
                map.next_value::<de::IgnoredAny>()?;
            }
        }
        Err(de::Error::custom("here"))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        if let Some((Step::Index(wanted), path)) = self.path.split_first() {
            for _ in 0..*wanted {
                seq.next_element::<de::IgnoredAny>()?;
            }
            seq.next_element_seed(Walk { path, ..self })?;
        }
        Err(de::Error::custom("here"))
    }
}

/// A key of a mapping. Fails at the wanted key if its line is wanted.
#[derive(Clone, Copy)]
struct Key<'a> {
    wanted: &'a str,
    fail: bool,
}

impl<'de> DeserializeSeed<'de> for Key<'_> {
    /// Whether it is the wanted key.
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Key<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: de::Error>(self, key: &str) -> Result<bool, E> {
        if key == self.wanted && self.fail {
            return Err(E::custom("here"));
        }
        Ok(key == self.wanted)
    }
}
