//! How the room on a screen is shared among panes and columns. Pure.

use super::{
    rows::Row,
    state::{PANES, Pane},
    text::{plain, width},
};

pub(super) struct Column {
    pub(super) title: &'static str,
    /// Numbers are aligned to the right.
    pub(super) right: bool,
    /// The column is never narrower than this, where it needs as much.
    least: usize,
}

const fn left(title: &'static str, least: usize) -> Column {
    Column {
        title,
        right: false,
        least,
    }
}

const fn right(title: &'static str) -> Column {
    Column {
        title,
        right: true,
        least: 7,
    }
}

const DATABASES: &[Column] = &[
    left("DATABASE", 11),
    left("PORTS", 8),
    right("RULES"),
    right("PASSED/S"),
    right("DROPPED/S"),
    right("PASSED"),
    right("DROPPED"),
    left("NOTE", 16),
];

const REFUSED: &[Column] = &[
    left("REFUSED SOURCE", 39),
    left("DATABASE", 8),
    left("REASON", 11),
    right("PACKETS"),
    right("AGO"),
    left("NOTE", 8),
];

const RULES: &[Column] = &[
    left("RULE", 22),
    left("DATABASE", 10),
    right("HITS/S"),
    right("HITS"),
    right("LEFT"),
    left("LABEL", 10),
];

const REGIONS: &[Column] = &[
    left("REGION", 14),
    right("PREFIXES"),
    right("AGE"),
    right("NEXT"),
    left("LAST LOOK-UP", 9),
    left("ERROR", 16),
];

const EVENTS: &[Column] = &[left("TIME", 9), left("LEVEL", 7), left("EVENT", 20)];

pub(super) fn columns(pane: Pane) -> &'static [Column] {
    match pane {
        Pane::Databases => DATABASES,
        Pane::Refused => REFUSED,
        Pane::Rules => RULES,
        Pane::Regions => REGIONS,
        Pane::Events => EVENTS,
    }
}

/// Rows of each pane below its header, as many as it needs, at least one. Where there is no room for all, the pane with the
/// focus gets what the others leave when each has two.
pub(super) fn heights(
    total: usize,
    needs: [usize; PANES.len()],
    focused: usize,
) -> [usize; PANES.len()] {
    let needs = needs.map(|need| need.max(1));
    let mut left = total.saturating_sub(PANES.len());
    let mut heights = [0; PANES.len()];
    // By a row each in turn, in this order: one for all, a second one, the focus, then the others again.
    let mut give = |pane: usize, most: usize| {
        let more = most
            .min(needs[pane])
            .saturating_sub(heights[pane])
            .min(left);
        heights[pane] += more;
        left -= more;
        more > 0
    };
    for most in [1, 2] {
        (0..PANES.len()).for_each(|pane| {
            give(pane, most);
        });
    }
    give(focused, usize::MAX);
    let mut most = 3;
    while (0..PANES.len()).fold(false, |given, pane| give(pane, most) | given) {
        most += 1;
    }
    heights
}

/// Columns as wide as their cells. Where there is no room, the last one is cut first, then the widest.
pub(super) fn widths(columns: &[Column], rows: &[Row], total: usize) -> Vec<usize> {
    let cell = |row: &Row, at: usize| row.cells.get(at).map_or(0, |cell| width(&plain(cell)));
    let widest = |(at, column): (usize, &Column)| {
        let cells = rows.iter().map(|row| cell(row, at)).max();
        cells.unwrap_or_default().max(column.title.len())
    };
    let mut widths: Vec<usize> = columns.iter().enumerate().map(widest).collect();
    let mut over = (widths.iter().sum::<usize>() + columns.len() - 1).saturating_sub(total);
    let mut narrow = |at: usize, least: usize| {
        let less = widths[at].saturating_sub(least).min(over);
        widths[at] -= less;
        over -= less;
    };
    // First to the least width, then to anything.
    for at in (0..columns.len()).rev() {
        narrow(at, columns[at].least.max(columns[at].title.len()));
    }
    for at in (0..columns.len()).rev().filter(|&at| !columns[at].right) {
        narrow(at, 4);
    }
    widths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn focus_gets_the_room_that_others_do_not_need() {
        assert_eq!(heights(40, [3, 5, 2, 0, 9], 0), [3, 5, 2, 1, 9]);
        assert_eq!(heights(18, [50, 50, 50, 50, 50], 1), [2, 5, 2, 2, 2]);
        assert_eq!(heights(18, [1, 2, 50, 0, 50], 2), [1, 2, 7, 1, 2]);
        assert_eq!(heights(18, [1, 2, 50, 0, 50], 0), [1, 2, 5, 1, 4]);
        assert_eq!(heights(10, [9, 9, 9, 9, 9], 4), [1, 1, 1, 1, 1]);
        assert_eq!(heights(0, [9, 9, 9, 9, 9], 4), [0, 0, 0, 0, 0]);
    }

    fn row(cells: &[&str]) -> Row {
        Row {
            cells: cells.iter().map(|&cell| cell.to_owned()).collect(),
            ..Row::default()
        }
    }

    #[test]
    fn longest_address_is_not_cut_on_80_columns() {
        let longest = "2001:0db8:1111:2222:3333:4444:5555:6666";
        let rows = [
            row(&[
                "198.51.100.7",
                "orders",
                "not-allowed",
                "1234567",
                "59s",
                "",
            ]),
            row(&[
                longest,
                "a-database-with-a-very-long-name",
                "extension-headers, monitor",
                "999.9M",
                "47h",
                "allowed for 59m",
            ]),
        ];
        let widths = widths(REFUSED, &rows, 78);
        assert!(widths[0] >= longest.len(), "{widths:?}");
        assert!(
            widths.iter().sum::<usize>() + REFUSED.len() - 1 <= 78,
            "{widths:?}"
        );
        assert!(widths[3] >= 7, "{widths:?}");
    }

    #[test]
    fn text_takes_what_is_left_and_no_row_needs_more_than_the_titles() {
        let text = "x".repeat(200);
        let rows = [row(&["20:14:07Z", "warning", &text])];
        assert_eq!(widths(EVENTS, &rows, 78), [9, 7, 60]);
        for pane in PANES {
            let columns = columns(pane);
            let titles: usize = columns.iter().map(|column| column.title.len() + 1).sum();
            assert!(titles <= 79, "{titles}");
            assert!(widths(columns, &[], 78).iter().sum::<usize>() + columns.len() <= 79);
        }
    }
}
