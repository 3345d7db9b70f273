//! Numbers, lists and what others wrote, in messages. Pure.

use std::borrow::Cow;

/// `1 prefix`, `2 prefixes`.
pub fn counted(count: usize, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

/// A text whose control characters are written out (`\u{1b}`), but for tabs and ends of lines: names of interfaces, and what
/// others sent, may have some that a terminal obeys.
pub fn written_out(text: &str) -> Cow<'_, str> {
    let is_obeyed = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
    if !text.contains(is_obeyed) {
        return text.into();
    }
    let mut plain = String::new();
    for character in text.chars() {
        if is_obeyed(character) {
            plain.extend(character.escape_default());
        } else {
            plain.push(character);
        }
    }
    plain.into()
}

pub fn list<T: ToString>(items: impl Iterator<Item = T>) -> String {
    items
        .map(|item| item.to_string())
        .collect::<Vec<_>>()
        .join(", ")
}
