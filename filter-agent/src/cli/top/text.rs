//! Text for a terminal: none of it is an escape sequence, and its width is known. Pure.

use unicode_width::UnicodeWidthChar as _;

/// Stands for the rest of a text that is cut.
const CUT: &str = "..";

/// A text whose control characters are written out (`\u{1b}`), and so are characters without a width of their own that
/// belong to no script: those that change the direction of text, and joiners, which terminals draw in different widths.
pub(super) fn plain(text: &str) -> String {
    let mut plain = String::new();
    for character in text.chars() {
        let is_invisible = character.width().unwrap_or_default() == 0;
        if character.is_control() || is_invisible && !character.is_alphabetic() {
            plain.extend(character.escape_default());
        } else {
            plain.push(character);
        }
    }
    plain
}

/// Columns of a plain text.
pub(super) fn width(text: &str) -> usize {
    text.chars()
        .map(|character| character.width().unwrap_or_default())
        .sum()
}

/// A plain text of at most this width.
pub(super) fn fit(text: &str, most: usize) -> String {
    if width(text) <= most {
        return text.to_owned();
    }
    let mut fitting = beginning(text, most.saturating_sub(CUT.len())).to_owned();
    fitting.push_str(&CUT[..CUT.len().min(most)]);
    fitting
}

/// The longest beginning of a plain text that is not wider.
fn beginning(text: &str, most: usize) -> &str {
    let mut columns = 0;
    let end = text.char_indices().find(|(_, character)| {
        columns += character.width().unwrap_or_default();
        columns > most
    });
    &text[..end.map_or(text.len(), |(at, _)| at)]
}

/// The lines of a plain text, of at most this width each; only words that are longer are divided.
pub(super) fn wrap(text: &str, most: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    let mut line = String::new();
    for mut word in text.split(' ') {
        if !line.is_empty() && width(&line) + 1 + width(word) > most {
            lines.push(std::mem::take(&mut line));
        }
        if !line.is_empty() {
            line.push(' ');
        }
        while width(word) > most {
            let part = beginning(word, most);
            if part.is_empty() {
                break;
            }
            lines.push(part.to_owned());
            word = &word[part.len()..];
        }
        line.push_str(word);
    }
    lines.push(line);
    lines
}

/// At most so many of these lines; the last one says that there are more.
pub(super) fn limit(mut lines: Vec<String>, most: usize, width: usize) -> Vec<String> {
    if lines.len() > most {
        lines.truncate(most);
        if let Some(last) = lines.last_mut() {
            *last = format!("{} {CUT}", beginning(last, width.saturating_sub(3)));
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_terminal_obeys_is_left() {
        assert_eq!(
            plain("\u{1b}[2J\u{1b}]0;x\u{7}"),
            r"\u{1b}[2J\u{1b}]0;x\u{7}"
        );
        assert_eq!(plain("\u{9b}31m"), r"\u{9b}31m");
        assert_eq!(plain("a\r\n\tb"), r"a\r\n\tb");
        assert_eq!(
            plain("\u{202e}evil\u{200d}\u{feff}"),
            r"\u{202e}evil\u{200d}\u{feff}"
        );
        for text in ["osc-fr1", "Büro Köln", "東京", "हिन्दी"] {
            assert_eq!(plain(text).replace(r"\u{94d}", "\u{94d}"), text);
        }
        let every = ('\0'..='\u{3ffff}').collect::<String>();
        let every = plain(&every);
        assert!(!every.contains(char::is_control));
        assert_eq!(plain(&every), every);
    }

    #[test]
    fn text_is_cut_and_wrapped_by_columns() {
        assert_eq!(fit("orders", 6), "orders");
        assert_eq!(fit("orders-eu", 6), "orde..");
        assert_eq!(fit("東京都", 5), "東..");
        assert_eq!(fit("東京都", 4), "東..");
        assert_eq!(fit("orders", 1), ".");
        assert_eq!(fit("orders", 0), "");
        assert_eq!(wrap("one two three", 7), ["one two", "three"]);
        assert_eq!(wrap("abcdefgh ij", 3), ["abc", "def", "gh", "ij"]);
        assert_eq!(wrap("東京都", 3), ["東", "京", "都"]);
        assert_eq!(wrap("", 3), [""]);
        assert_eq!(wrap("東", 1), ["東"]);
        for most in 1..20 {
            for line in wrap("one two three 東京都 abcdefghijkl", most.max(2)) {
                assert!(width(&line) <= most.max(2), "{line}");
            }
        }
        let lines = wrap("one two three", 7);
        assert_eq!(limit(lines.clone(), 2, 7), lines);
        assert_eq!(limit(lines, 1, 7), ["one  .."]);
    }
}
