//! Numbers, lists and what others wrote, in messages. Pure.

use std::borrow::Cow;

/// `1 prefix`, `2 prefixes`.
pub fn counted(count: usize, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

/// A text whose control characters are written out (`\u{1b}`), but for tabs and ends of lines: names of interfaces, and what
/// others sent, may have some that a terminal obeys.
pub fn written_out(text: &str) -> Cow<'_, str> {
    let is_obeyed = |c: char| is_control(c) && !matches!(c, '\n' | '\t');
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

/// Control characters, those included that change the direction of text (Unicode Standard Annex 9): a text that has one
/// looks like another in a terminal.
pub fn is_control(character: char) -> bool {
    const DIRECTIONS: [std::ops::RangeInclusive<char>; 4] = [
        '\u{61c}'..='\u{61c}',
        '\u{200e}'..='\u{200f}',
        '\u{202a}'..='\u{202e}',
        '\u{2066}'..='\u{2069}',
    ];
    character.is_control() || DIRECTIONS.iter().any(|range| range.contains(&character))
}

/// A text of another machine, of any length and content, as one line. `longest`: in characters.
pub fn one_line(text: &str, longest: usize) -> String {
    let visible = |c: char| if is_control(c) { ' ' } else { c };
    text.chars().take(longest).map(visible).collect()
}

pub fn list<T: ToString>(items: impl Iterator<Item = T>) -> String {
    items
        .map(|item| item.to_string())
        .collect::<Vec<_>>()
        .join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_a_server_is_one_short_line() {
        let hostile = format!("no\n\x1b[2Jleader{}", "x".repeat(10_000));
        let line = one_line(&hostile, 300);
        assert!(line.starts_with("no  [2Jleaderxx"), "{line}");
        assert_eq!(line.chars().count(), 300);
    }

    #[test]
    fn characters_that_change_the_direction_of_text_are_not_obeyed() {
        for turning in "\u{61c}\u{200e}\u{200f}\u{202a}\u{202e}\u{2066}\u{2069}".chars() {
            let text = format!("passes{turning}é");
            let hex = u32::from(turning);
            assert_eq!(written_out(&text), format!("passes\\u{{{hex:x}}}é"));
            assert_eq!(one_line(&text, 300), "passes é");
        }
    }
}
