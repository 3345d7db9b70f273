//! The address from which the user of a command is logged in, which the command may cut off.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs,
    net::IpAddr,
    os::unix::ffi::OsStrExt as _,
    path::Path,
    process,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{cli::client::encode, report::LockOut};

/// The variable in which sshd passes the addresses and ports of the client and of the server.
const VARIABLE: &str = "SSH_CONNECTION";

/// Longest chain of parents. The kernel has no loops; processes that come and go while it is read could look like one.
const MAX_PARENTS: usize = 1000;

pub(super) enum Caller {
    /// Not over the network, as far as is known.
    Console,
    At(IpAddr),
    /// The reason why the caller's address is unknown.
    Unknown(String),
}

impl Caller {
    /// Finds who runs this process: by its own environment, or by that of its parents, as sudo clears it.
    pub(super) fn find() -> Self {
        let found = match env::var_os(VARIABLE) {
            Some(value) => client(&value).map(Some),
            None => of_parents(Path::new("/proc"), process::id()).and_then(|found| {
                ensure!(
                    found.is_some() || is_among_all_processes(),
                    "this process is in a PID namespace of its own, as in a container: who started it is not visible"
                );
                Ok(found)
            }),
        };
        match found {
            Ok(Some(address)) => Self::At(address),
            Ok(None) => Self::Console,
            Err(error) => Self::Unknown(format!("{error:#}")),
        }
    }

    /// As a part of a request's query; empty: it is not known.
    pub(super) fn query(&self) -> String {
        let address = self.address().map(|address| address.to_string());
        let query = address.map(|address| format!("caller={}", encode(&address)));
        query.unwrap_or_default()
    }

    pub(super) fn address(&self) -> Option<IpAddr> {
        match self {
            Self::At(address) => Some(*address),
            Self::Console | Self::Unknown(_) => None,
        }
    }

    /// Prints what the caller loses by a change.
    pub(super) fn print(&self, lock_out: &[LockOut]) {
        let Self::At(address) = self else { return };
        for LockOut { database, rule } in lock_out {
            let what = match rule {
                Some(rule) => format!("which {rule} allowed"),
                None => "which was not guarded, or only monitored".into(),
            };
            say!("you: {address} (from {VARIABLE}) loses access to database {database}, {what}");
        }
    }

    /// Tells on stderr, where JSON does not matter, if nothing is known.
    pub(super) fn tell_if_unknown(&self) {
        if let Self::Unknown(why) = self {
            eprintln!("you: it is not known whether this cuts you off: {why}");
        }
    }
}

/// The address of the client in a value of the variable. A scope, such as that of `fe80::1%eth0`, is left out.
fn client(value: &OsStr) -> Result<IpAddr> {
    let parse = |text: &str| -> Option<IpAddr> {
        let fields: Vec<&str> = text.split(' ').collect();
        let [client, client_port, server, server_port] = fields[..] else {
            return None;
        };
        let address = |text: &str| -> Option<IpAddr> {
            let (address, _) = text.split_once('%').unwrap_or((text, ""));
            address.parse().ok()
        };
        client_port.parse::<u16>().ok()?;
        server_port.parse::<u16>().ok()?;
        address(server)?;
        Some(address(client)?.to_canonical())
    };
    let address = value.to_str().and_then(parse);
    address.with_context(|| format!("{VARIABLE} is {value:?}, which names no client"))
}

/// Whether this process sees all of the host's. A namespace that cannot be read counts as such a one.
fn is_among_all_processes() -> bool {
    // The inode of the first PID namespace: PROC_PID_INIT_INO of the kernel's include/linux/proc_ns.h.
    const FIRST: &str = "pid:[4026531836]";
    fs::read_link("/proc/self/ns/pid").map_or(true, |link| link.as_os_str() == FIRST)
}

/// The address of the client in the environment of the nearest parent that has the variable; `None`: none has it.
///
/// # Errors
/// No parent that can be read has it, and one cannot be read.
fn of_parents(proc: &Path, process: u32) -> Result<Option<IpAddr>> {
    let mut unreadable = None;
    let mut process = process.to_string();
    for _ in 0..MAX_PARENTS {
        let parent = parent(&proc.join(&process).join("status"));
        process = match parent.context("find the parents of this process")? {
            parent if parent == "0" && process == "1" => return unreadable.map_or(Ok(None), Err),
            // As in a container that a command was started in.
            parent if parent == "0" => {
                bail!("parents of this process are in another PID namespace")
            }
            parent => parent,
        };
        let environment = proc.join(&process).join("environ");
        match fs::read(&environment) {
            Ok(environment) => {
                if let Some(value) = variable(&environment) {
                    return client(&value).map(Some);
                }
            }
            // No login starts the first process of a host, which in a container even root may not read.
            Err(_) if process == "1" => {}
            Err(error) => {
                let error = anyhow::Error::new(error);
                let error = error.context(format!("read {}", environment.display()));
                unreadable.get_or_insert(error);
            }
        }
    }
    bail!("this process has more than {MAX_PARENTS} parents")
}

fn parent(status: &Path) -> Result<String> {
    let text = fs::read(status).with_context(|| format!("read {}", status.display()))?;
    let text = String::from_utf8_lossy(&text);
    let parent = text.lines().find_map(|line| line.strip_prefix("PPid:"));
    let parent = parent.with_context(|| format!("find PPid in {}", status.display()))?;
    Ok(parent.trim().to_owned())
}

fn variable(environment: &[u8]) -> Option<OsString> {
    let mut entries = environment.split(|&byte| byte == 0);
    entries.find_map(|entry| {
        let value = entry.strip_prefix(VARIABLE.as_bytes())?;
        Some(OsStr::from_bytes(value.strip_prefix(b"=")?).to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_of_the_client_is_read() {
        let read = |value: &str| client(OsStr::new(value)).ok().map(|a| a.to_string());
        let some = |address: &str| Some(address.to_owned());
        assert_eq!(read("203.0.113.7 52134 10.0.0.5 22"), some("203.0.113.7"));
        assert_eq!(
            read("2001:db8::7 52134 2001:db8::5 22"),
            some("2001:db8::7")
        );
        assert_eq!(
            read("::ffff:203.0.113.7 52134 ::ffff:10.0.0.5 22"),
            some("203.0.113.7")
        );
        assert_eq!(read("fe80::7%eth0 52134 fe80::5%eth0 22"), some("fe80::7"));
        for malformed in [
            "",
            "203.0.113.7",
            "203.0.113.7 52134 10.0.0.5",
            "203.0.113.7 52134 10.0.0.5 22 more",
            "203.0.113.7  52134 10.0.0.5 22",
            "203.0.113.7 70000 10.0.0.5 22",
            "203.0.113.300 52134 10.0.0.5 22",
            "client.test 52134 10.0.0.5 22",
            // sshd's value where its input is not a socket.
            "UNKNOWN 65535 UNKNOWN 65535",
        ] {
            assert_eq!(read(malformed), None, "{malformed}");
        }
        assert!(client(OsStr::from_bytes(b"\xff 1 10.0.0.5 22")).is_err());
    }

    struct Processes(tempfile::TempDir);

    impl Processes {
        /// Process 40, whose parent is 30, whose parent is 20, whose parent is 1.
        fn new() -> Self {
            let processes = Self(tempfile::tempdir().unwrap());
            let chain = [("40", 30), ("30", 20), ("20", 1), ("1", 0)];
            for (process, parent) in chain {
                let folder = processes.0.path().join(process);
                fs::create_dir(&folder).unwrap();
                let status = format!("Name:\t\u{fffd} PPid:\nPid:\t9\nPPid:\t{parent}\n");
                fs::write(folder.join("status"), status).unwrap();
                processes.has(process, "PATH=/bin\0");
            }
            processes
        }

        fn has(&self, process: &str, environment: &str) {
            fs::write(self.environment(process), environment).unwrap();
        }

        fn environment(&self, process: &str) -> std::path::PathBuf {
            self.0.path().join(process).join("environ")
        }

        fn found(&self) -> Result<Option<String>> {
            let found = of_parents(self.0.path(), 40)?;
            Ok(found.map(|address| address.to_string()))
        }
    }

    const FROM: &str = "A=1\0SSH_CONNECTION=203.0.113.7 1 10.0.0.5 22\0B=2\0";

    #[test]
    fn nearest_parent_with_the_variable_decides() {
        let processes = Processes::new();
        assert_eq!(processes.found().unwrap(), None);
        processes.has("20", FROM);
        assert_eq!(processes.found().unwrap().unwrap(), "203.0.113.7");
        processes.has("30", "NOT_SSH_CONNECTION=x\0SSH_CONNECTION_2=y\0");
        assert_eq!(processes.found().unwrap().unwrap(), "203.0.113.7");
        processes.has("30", "SSH_CONNECTION=2001:db8::7 1 2001:db8::5 22");
        assert_eq!(processes.found().unwrap().unwrap(), "2001:db8::7");
        processes.has("30", "SSH_CONNECTION=nonsense\0");
        let error = processes.found().unwrap_err().to_string();
        assert!(error.contains("names no client"), "{error}");
    }

    #[test]
    fn parents_that_cannot_be_read_are_no_console() {
        let processes = Processes::new();
        fs::remove_file(processes.environment("1")).unwrap();
        assert_eq!(processes.found().unwrap(), None);
        fs::remove_file(processes.environment("30")).unwrap();
        let error = processes.found().unwrap_err().to_string();
        assert!(error.starts_with("read "), "{error}");
        // Another one knows.
        processes.has("20", FROM);
        assert_eq!(processes.found().unwrap().unwrap(), "203.0.113.7");
        fs::remove_file(processes.0.path().join("30/status")).unwrap();
        assert!(processes.found().is_err());
    }

    #[test]
    fn parents_in_another_namespace_are_no_console() {
        let processes = Processes::new();
        fs::write(processes.0.path().join("20/status"), "PPid:\t0\n").unwrap();
        let error = processes.found().unwrap_err().to_string();
        assert!(error.contains("another PID namespace"), "{error}");
    }

    #[test]
    fn parents_without_end_are_given_up() {
        let processes = Processes::new();
        fs::write(processes.0.path().join("1/status"), "PPid:\t30\n").unwrap();
        assert!(processes.found().is_err());
    }
}
