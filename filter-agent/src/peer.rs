//! Who a process belongs to, from /proc.

use std::fs;

use crate::{report::By, text::is_control};

/// The owner of a process. `pid`: as the kernel says, if it does; a process that has ended is known by its user alone.
pub fn owner(uid: u32, pid: Option<i32>) -> By {
    let read = |file: &str| {
        let text = fs::read_to_string(format!("/proc/{}/{file}", pid?)).ok()?;
        Some(text.trim().to_owned())
    };
    // The kernel's number for nobody who logged in.
    let login_uid = read("loginuid").and_then(|uid| uid.parse().ok());
    By {
        uid,
        login_uid: login_uid.filter(|&uid| uid != u32::MAX),
        pid,
        // Any process names itself, and the name is printed.
        command: read("comm").map(|name| name.replace(is_control, "?")),
    }
}
