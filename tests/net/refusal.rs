//! Agents that must not come up.

use std::{
    io,
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Command, Stdio},
};

use nix::{errno::Errno, sys::socket::AddressFamily};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};

use crate::net::{binary::agent_binary, hosts::Net, wait::wait};

impl Net {
    /// Starts an agent that must not come up, and returns the one line it says.
    pub fn refusal(&self, arguments: &[&str]) -> String {
        let mut command = self.agent_command(&[&["run"], arguments].concat());
        self.refused(&mut command)
    }

    /// The same with another bpffs and socket, as if it were another host's.
    pub fn refusal_elsewhere(&self, bpffs: &Path, socket: &Path) -> String {
        let mut command = Command::new(agent_binary());
        command.arg("run").arg("--policy").arg(self.policy_path());
        command.arg("--bpffs").arg(bpffs);
        command.arg("--socket").arg(socket);
        command.arg("--state-dir").arg(self.dir.join("elsewhere"));
        self.refused(&mut command)
    }

    /// The same without root.
    pub fn refusal_without_root(&self) -> String {
        let mut command = self.agent_command(&["run"]);
        command.uid(65534).gid(65534);
        self.refused(&mut command)
    }

    /// The same where every call of bpf(2) fails with this error.
    pub fn refusal_without_bpf(&self, error: Errno) -> String {
        self.refusal_where_calls_fail(nix::libc::SYS_bpf, Vec::new(), error)
    }

    /// The same where every call of bpf(2) with this command fails with this error.
    pub fn refusal_without_bpf_command(&self, command: u32, error: Errno) -> String {
        let (length, operator) = (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq);
        let is_command = SeccompCondition::new(0, length, operator, command.into()).unwrap();
        let rules = vec![SeccompRule::new(vec![is_command]).unwrap()];
        self.refusal_where_calls_fail(nix::libc::SYS_bpf, rules, error)
    }

    /// The same where it cannot open a netlink socket.
    pub fn refusal_without_netlink(&self) -> String {
        let (length, operator) = (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq);
        let netlink = AddressFamily::Netlink as u64;
        let is_netlink = SeccompCondition::new(0, length, operator, netlink).unwrap();
        let rules = vec![SeccompRule::new(vec![is_netlink]).unwrap()];
        self.refusal_where_calls_fail(nix::libc::SYS_socket, rules, Errno::EPERM)
    }

    /// `rules`: which calls; none means all of them.
    fn refusal_where_calls_fail(&self, call: i64, rules: Vec<SeccompRule>, error: Errno) -> String {
        let filter = SeccompFilter::new(
            [(call, rules)].into(),
            SeccompAction::Allow,
            SeccompAction::Errno(error as u32),
            std::env::consts::ARCH.try_into().unwrap(),
        );
        let filter: BpfProgram = filter.unwrap().try_into().unwrap();
        let mut command = self.agent_command(&["run"]);
        self.refused_after(&mut command, || seccompiler::apply_filter(&filter).unwrap())
    }

    fn refused(&self, command: &mut Command) -> String {
        self.refused_after(command, || {})
    }

    /// `prepare`: what is done to the thread that starts the agent.
    fn refused_after(&self, command: &mut Command, prepare: impl FnOnce() + Send) -> String {
        command.stdin(Stdio::null()).stderr(Stdio::piped());
        let mut child = self.db.run(|| {
            prepare();
            command.spawn().unwrap()
        });
        let Some(status) = wait(&mut child) else {
            child.kill().unwrap();
            panic!("the agent started although it should have refused");
        };
        let stderr = io::read_to_string(child.stderr.unwrap()).unwrap();
        assert_eq!(status.code(), Some(1), "{stderr}");
        assert_eq!(stderr.trim_end().lines().count(), 1, "{stderr}");
        stderr.trim_end().into()
    }
}
