//! The view on a screen. All text passes `plain`, so that none of it is an escape sequence.

use std::time::Instant;

use jiff::Timestamp;
use ratatui::{
    Frame,
    buffer::Buffer,
    layout::{Constraint, Layout, Rect},
    style::{Color, Modifier, Style},
};

use super::{
    columns::{Column, columns, heights, widths},
    numbers::short_duration,
    rows::{Mark, Row},
    state::{Look, Mode, PANES, Pane, State},
    text::{fit, limit, plain, width, wrap},
};

/// The smallest screen on which the view is of use.
const SMALLEST: (u16, u16) = (60, 16);

/// Most lines of the agent's errors and warnings, and of the description of a row.
const MAX_LINES: usize = 3;

/// Most lines of what came of a key.
const MAX_MESSAGE: usize = 8;

const KEYS: &str = "q quit  ? help  tab pane  arrows choose  d database  a allow";

const HELP: [&str; 16] = [
    "q, Ctrl-C      quit",
    "tab, arrows    next and previous pane",
    "up, down       choose a row; the lines below the panes show the whole of it",
    "page, home, end",
    "d, D           show only the next or the previous database, then all",
    "enter          on a database: show only this one, and again all",
    "esc            show all databases",
    "a              on a refused source: allow it for an hour, after a question",
    "",
    "Counts are packets: of databases and rules since the filter was first attached,",
    "of refused sources samples since the agent started. /S: a second; -: not known.",
    "Where a database is only monitored, packets are not dropped, but counted.",
    "Refused sources: those of the last minute, with most packets first; then the",
    "others, the latest first.",
    "",
    "any other key  back",
];

/// `colours`: besides reverse and bold, which any terminal has.
pub(super) fn draw(
    frame: &mut Frame<'_>,
    state: &State,
    colours: bool,
    now: Timestamp,
    instant: Instant,
) {
    let area = frame.area();
    let screen = &mut Screen {
        buffer: frame.buffer_mut(),
        colours,
    };
    if area.width < SMALLEST.0 || area.height < SMALLEST.1 {
        let (columns, lines) = SMALLEST;
        let text = format!("at least {columns}x{lines} characters are needed; q quits");
        screen.lines(area, &wrap(&text, area.width.into()), Style::new());
        return;
    }
    let all = usize::from(area.width);
    let notices = notices(state, now, instant, all);
    let below = below(state, now, all);
    let [title, top, panes, bottom, keys] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(notices.len() as u16),
        Constraint::Fill(1),
        Constraint::Length(below.len().max(2) as u16),
        Constraint::Length(1),
    ])
    .areas(area);
    screen.title(title, state, now);
    for (line, (mark, text)) in top.rows().zip(&notices) {
        screen.line(line, text, screen.style(*mark));
    }
    if state.mode == Mode::Help {
        screen.lines(panes, &HELP.map(str::to_owned), Style::new());
    } else {
        screen.panes(panes, state, now);
    }
    let style = match state.mode {
        Mode::Question(_) => Style::new().add_modifier(Modifier::REVERSED),
        Mode::Normal | Mode::Help => Style::new(),
    };
    screen.lines(bottom, &below, style);
    screen.line(keys, KEYS, Style::new().add_modifier(Modifier::DIM));
}

/// Lines about what is wrong, or one that nothing is.
fn notices(state: &State, now: Timestamp, instant: Instant, width: usize) -> Vec<(Mark, String)> {
    let mut notices = Vec::new();
    if let Some(silence) = state.silence(instant) {
        notices.push((Mark::Error, silence));
    } else if let Some(look) = &state.look {
        let status = &look.status;
        if let Some(window) = &status.window {
            notices.push((Mark::Warning, window.to_string()));
        }
        let unenforced = status.not_enforced.iter();
        let unenforced = unenforced.filter(|why| !status.errors.contains(why));
        let errors = status.errors.iter().chain(unenforced);
        notices.extend(errors.map(|error| (Mark::Error, format!("error: {error}"))));
        let warnings = status.warnings.iter();
        notices.extend(warnings.map(|text| (Mark::Warning, format!("warning: {text}"))));
        if notices.len() == usize::from(status.window.is_some()) {
            notices.push((Mark::None, enforced(look, now)));
        }
    } else {
        notices.push((Mark::None, "waiting for the agent".into()));
    }
    let mut lines = Vec::new();
    for (mark, text) in &notices {
        let wrapped = wrap(&plain(text), width);
        lines.extend(wrapped.into_iter().map(|line| (*mark, line)));
    }
    if lines.len() > MAX_LINES {
        lines.truncate(MAX_LINES - 1);
        let mark = notices[0].0;
        lines.push((mark, ".. the rest: `filter-agent status`".into()));
    }
    lines
}

fn enforced(look: &Look, now: Timestamp) -> String {
    let interfaces = look.status.interfaces.iter().map(|interface| {
        let mode = interface.mode.as_deref().unwrap_or("not filtered");
        format!("{} {mode}", interface.name)
    });
    let interfaces: Vec<String> = interfaces.collect();
    let verified = now.duration_since(look.status.verified.at).as_secs();
    let verified = short_duration(verified.unsigned_abs());
    let interfaces = interfaces.join(", ");
    format!("enforced on {interfaces}; verified by probe packets {verified} ago")
}

/// The lines below the panes: a question, what came of a key, or the whole of the chosen row.
fn below(state: &State, now: Timestamp, width: usize) -> Vec<String> {
    if let Mode::Question(wanted) = &state.mode {
        let text = format!(
            "allow {} to {} for 1 hour? [y/N]",
            wanted.source, wanted.database
        );
        return wrap(&plain(&text), width);
    }
    if !state.message.is_empty() {
        let lines = state.message.iter();
        let lines = lines.flat_map(|line| wrap(&plain(line), width)).collect();
        return limit(lines, MAX_MESSAGE, width);
    }
    let rows = state.rows(state.focused, now);
    let row = rows.get(state.chosen(state.focused, &rows));
    let detail = row.map_or(String::new(), |row| plain(&row.detail));
    limit(wrap(&detail, width), MAX_LINES, width)
}

struct Screen<'a> {
    buffer: &'a mut Buffer,
    colours: bool,
}

impl Screen<'_> {
    fn style(&self, mark: Mark) -> Style {
        match mark {
            Mark::None => Style::new(),
            Mark::Warning if self.colours => Style::new().fg(Color::Yellow),
            Mark::Error if self.colours => Style::new().fg(Color::Red),
            Mark::Warning | Mark::Error => Style::new().add_modifier(Modifier::BOLD),
        }
    }

    fn line(&mut self, line: Rect, text: &str, style: Style) {
        let text = fit(&plain(text), line.width.into());
        self.buffer.set_string(line.x, line.y, text, style);
        self.buffer.set_style(line, style);
    }

    fn lines(&mut self, area: Rect, lines: &[String], style: Style) {
        for (line, text) in area.rows().zip(lines) {
            self.line(line, text, style);
        }
    }

    fn title(&mut self, line: Rect, state: &State, now: Timestamp) {
        let agent = state.look.as_ref().map(|look| {
            let status = &look.status;
            let up = now.duration_since(status.started).as_secs();
            let up = short_duration(up.unsigned_abs());
            format!(
                "filter-agent {}, pid {}, up {up}",
                status.version, status.pid
            )
        });
        let database = match &state.database {
            Some(database) => format!("only {database}"),
            None => "all databases".into(),
        };
        let right = format!("{database}  {}", now.strftime("%TZ"));
        let bold = Style::new().add_modifier(Modifier::BOLD);
        let agent = agent.unwrap_or_else(|| "filter-agent".into());
        self.line(line, &agent, bold);
        let columns = width(&right).min(line.width.into()) as u16;
        let right_end = Rect {
            x: line.right() - columns,
            width: columns,
            ..line
        };
        self.line(right_end, &right, bold);
    }

    fn panes(&mut self, area: Rect, state: &State, now: Timestamp) {
        let rows = PANES.map(|pane| state.rows(pane, now));
        let needs = rows.each_ref().map(Vec::len);
        let heights = heights(area.height.into(), needs, state.focused as usize);
        let heights = heights.map(|height| Constraint::Length(height as u16 + 1));
        let areas: [Rect; PANES.len()] = Layout::vertical(heights).areas(area);
        for ((pane, area), rows) in PANES.into_iter().zip(areas).zip(rows) {
            self.pane(area, pane, state, &rows);
        }
    }

    fn pane(&mut self, area: Rect, pane: Pane, state: &State, rows: &[Row]) {
        let mut lines = area.rows();
        let Some(header) = lines.next() else { return };
        let height = usize::from(area.height) - 1;
        let is_focused = state.focused == pane;
        let columns = columns(pane);
        // A mark of the chosen row before each.
        let widths = widths(columns, rows, usize::from(area.width) - 2);
        let place = state.chosen(pane, rows);
        // The chosen row is on the screen, whether or not its pane has the focus.
        let first = (place + 1).saturating_sub(height);
        let titles = columns.iter().map(|column| column.title.to_owned());
        let mut titles = cells(columns, &widths, titles);
        if rows.len() > height {
            let last = (first + height).min(rows.len());
            let range = format!(" {}-{last} of {}", first + 1, rows.len());
            titles = fit(&titles, usize::from(area.width) - 2 - width(&range));
            let gap = usize::from(area.width) - 2 - width(&titles) - width(&range);
            titles.push_str(&" ".repeat(gap));
            titles.push_str(&range);
        }
        let mut style = Style::new().add_modifier(Modifier::BOLD | Modifier::UNDERLINED);
        if is_focused {
            style = style.add_modifier(Modifier::REVERSED);
        }
        self.line(header, &format!("  {titles}"), style);
        let shown = rows.iter().enumerate().skip(first);
        for ((at, row), line) in shown.zip(&mut lines) {
            let is_chosen = is_focused && at == place;
            let mut style = self.style(row.mark);
            if is_chosen {
                style = style.add_modifier(Modifier::REVERSED);
            }
            let mark = if is_chosen { ">" } else { " " };
            let cells = cells(columns, &widths, row.cells.iter().map(|cell| plain(cell)));
            self.line(line, &format!("{mark} {cells}"), style);
        }
        if rows.is_empty()
            && let Some(line) = lines.next()
        {
            let nothing = nothing(pane, state);
            self.line(line, &format!("  {nothing}"), Style::new());
        }
    }
}

/// Text of a pane without rows.
fn nothing(pane: Pane, state: &State) -> String {
    if state.look.is_none() {
        return "not known yet".into();
    }
    match (pane, &state.events_error) {
        (Pane::Databases, _) => "no database",
        (Pane::Refused, _) => "no packet was dropped since the agent started",
        (Pane::Rules, _) => "no rule",
        (Pane::Regions, _) => "no rule names a region",
        (Pane::Events, None) => "no line of the log",
        (Pane::Events, Some(error)) => return format!("not known: {error}"),
    }
    .into()
}

/// Cells side by side, each as wide as its column.
fn cells(columns: &[Column], widths: &[usize], cells: impl Iterator<Item = String>) -> String {
    let cells = columns.iter().zip(widths).zip(cells);
    let cells = cells.map(|((column, &most), cell)| {
        let cell = fit(&cell, most);
        let gap = " ".repeat(most - width(&cell));
        match column.right {
            true => format!("{gap}{cell}"),
            false => format!("{cell}{gap}"),
        }
    });
    cells.collect::<Vec<_>>().join(" ").trim_end().to_owned()
}
