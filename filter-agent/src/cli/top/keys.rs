//! The effect of keys. Pure.

use crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use jiff::Timestamp;

use super::state::{Mode, PANES, Pane, State, Wanted};

/// Rows of a page.
const PAGE: usize = 10;

/// A task for the owner of the terminal.
#[derive(Debug, PartialEq)]
pub(super) enum Action {
    Quit,
    Allow(Wanted),
}

impl State {
    pub(super) fn press(&mut self, key: KeyEvent, now: Timestamp) -> Option<Action> {
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        if control && matches!(key.code, KeyCode::Char('c')) {
            return Some(Action::Quit);
        }
        match std::mem::replace(&mut self.mode, Mode::Normal) {
            Mode::Normal => self.press_normal(key.code, now),
            Mode::Help => None,
            Mode::Question(wanted) => match key.code {
                KeyCode::Char('y' | 'Y') => {
                    let Wanted { database, source } = &wanted;
                    self.message = vec![format!("allowing {source} to {database} ...")];
                    Some(Action::Allow(wanted))
                }
                _ => {
                    self.message = vec![format!("{} was not allowed", wanted.source)];
                    None
                }
            },
        }
    }

    fn press_normal(&mut self, key: KeyCode, now: Timestamp) -> Option<Action> {
        self.message.clear();
        match key {
            KeyCode::Char('q') => return Some(Action::Quit),
            KeyCode::Char('?') => self.mode = Mode::Help,
            KeyCode::Tab | KeyCode::Right => self.focus(1),
            KeyCode::BackTab | KeyCode::Left => self.focus(PANES.len() - 1),
            KeyCode::Down => self.step(|place, _| place + 1, now),
            KeyCode::Up => self.step(|place, _| place.saturating_sub(1), now),
            KeyCode::PageDown => self.step(|place, _| place + PAGE, now),
            KeyCode::PageUp => self.step(|place, _| place.saturating_sub(PAGE), now),
            KeyCode::Home => self.step(|_, _| 0, now),
            KeyCode::End => self.step(|_, last| last, now),
            KeyCode::Char('d') => self.next_database(|place, count| (place + 1) % (count + 1)),
            KeyCode::Char('D') => self.next_database(|place, count| (place + count) % (count + 1)),
            KeyCode::Esc => self.database = None,
            KeyCode::Enter if self.focused == Pane::Databases => self.only_chosen(now),
            KeyCode::Char('a') => self.ask(now),
            _ => {}
        }
        None
    }

    fn focus(&mut self, by: usize) {
        self.focused = PANES[(self.focused as usize + by) % PANES.len()];
    }

    /// `to`: the new place, from the old one and the last.
    fn step(&mut self, to: impl Fn(usize, usize) -> usize, now: Timestamp) {
        let rows = self.rows(self.focused, now);
        let place = self.chosen(self.focused, &rows);
        let place = to(place, rows.len().saturating_sub(1));
        self.choose(self.focused, &rows, place);
    }

    /// `next`: the new place, from the old one and the number of databases; 0: all of them.
    fn next_database(&mut self, next: impl Fn(usize, usize) -> usize) {
        let databases = self.look.iter().flat_map(|look| &look.status.databases);
        let names: Vec<&String> = databases.map(|database| &database.name).collect();
        let shown = self.database.as_ref();
        let place = shown.and_then(|shown| names.iter().position(|name| *name == shown));
        let place = next(place.map_or(0, |place| place + 1), names.len());
        let name = place.checked_sub(1).map(|place| names[place].clone());
        self.database = name;
    }

    /// Shows only the chosen database, or all again.
    fn only_chosen(&mut self, now: Timestamp) {
        let rows = self.rows(Pane::Databases, now);
        let row = rows.get(self.chosen(Pane::Databases, &rows));
        // The row of packets for any database has no name.
        let name = row.map(|row| row.id.clone()).filter(|id| !id.is_empty());
        self.database = name.filter(|_| self.database.is_none());
    }

    /// Asks whether to allow the chosen source. It stays the one that is asked about, whatever comes meanwhile.
    fn ask(&mut self, now: Timestamp) {
        if self.focused != Pane::Refused {
            self.focused = Pane::Refused;
            self.message = vec!["choose a source with the arrows, then press a".into()];
            return;
        }
        let rows = self.rows(Pane::Refused, now);
        match rows.get(self.chosen(Pane::Refused, &rows)) {
            Some(row) => match &row.allow {
                Some(Ok(wanted)) => self.mode = Mode::Question(wanted.clone()),
                Some(Err(why)) => self.message = vec![why.clone()],
                None => {}
            },
            None => self.message = vec!["no source is refused".into()],
        }
    }
}
