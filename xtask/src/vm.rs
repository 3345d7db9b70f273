//! The system test: the package in a booted Debian with real systemd and PostgreSQL, whose address and
//! default route come late, and three clients outside that never stop trying.

pub mod drivers;
mod fleet;
mod image;
mod machine;
mod outside;
mod streams;

use std::net::Ipv4Addr;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::dist::{self, Profile};
use fleet::Etcd;
pub use image::debian;
use image::{base, furnish, policy};
use machine::{FOLDER, Machine, PATIENCE, design, wait_for};
use outside::{Denied, GUESTS, Outside, PORT, database, serves_guest};
use streams::Streams;

/// Debian 12's own kernel, and the later one of the same repository.
pub const KERNELS: [&str; 2] = ["6.1", "6.12"];

/// At most, as `systemd-analyze security` sees the unit: 0 is the safest, 10 the least safe.
const EXPOSURE: f32 = 2.0;

/// Commands that print the state of the service, and of the socket for readers.
const ACTIVE: &str = "systemctl is-active filter-agent";
const SOCKET_ACTIVE: &str = "systemctl is-active filter-agent-status.socket";

/// The phases of the machine, and whether the database is up all the time.
const PHASES: [(&str, &str, bool); 10] = [
    (
        "agent stopped",
        "systemctl stop filter-agent; sleep 5",
        true,
    ),
    (
        "agent started",
        "systemctl start filter-agent; sleep 5",
        true,
    ),
    (
        "agent killed",
        "systemctl kill -s KILL filter-agent; sleep 8",
        true,
    ),
    (
        "policy reloaded",
        "for i in 1 2 3; do systemctl reload filter-agent; sleep 2; done",
        true,
    ),
    (
        "package upgraded",
        "dpkg -i /root/next.deb >/dev/null 2>&1; sleep 5",
        true,
    ),
    (
        "package downgraded",
        "dpkg -i /root/this.deb >/dev/null 2>&1; sleep 5",
        true,
    ),
    (
        "interface down and up",
        "ip link set eth0 down; sleep 3; ip link set eth0 up
         until ip route | grep -q '^default'; do sleep 1; done",
        false,
    ),
    (
        "default route away",
        "ip route del default
         systemctl restart filter-agent; sleep 2; systemctl reload filter-agent; sleep 2
         ip route add default via 10.77.0.2 dev eth0",
        true,
    ),
    (
        "agent restarted",
        "systemctl restart filter-agent; sleep 5",
        true,
    ),
    (
        "database restarted",
        "systemctl restart postgresql; sleep 8",
        false,
    ),
];

/// Boots each kernel, installs packages of this profile and prints what the clients saw. `with_streams`: runs the tests of forced
/// TLS in the machine as well.
pub fn test(kernels: &[&str], profile: Profile, with_streams: bool) -> Result<()> {
    let this = dist::make(profile)?;
    let next = dist::package(profile, "target/vm/next", 2)?;
    let base = base()?;
    let streams = with_streams.then(|| Streams::build(profile));
    let streams = streams.transpose()?;
    for kernel in kernels {
        // The clients try from before power-on.
        let outside = Outside::start(Path::new(FOLDER))?;
        let phase = Phase::begin("boot", false, &outside)?;
        let machine = Machine::boot(design(kernel), &base, |root| {
            furnish(root, &this, &next)?;
            streams.as_ref().map_or(Ok(()), |streams| streams.put(root))
        })?;
        let scenario = Scenario {
            kernel: (*kernel).into(),
            machine,
            outside,
            phase,
            answered: Vec::new(),
        };
        scenario.live(streams.as_ref())?;
    }
    Ok(())
}

/// Something that the machine goes through, with what was counted when it began.
struct Phase {
    name: String,
    begin: Instant,
    /// Whether the database is up all the time.
    up: bool,
    tries: u64,
    answers: u64,
    /// Of the client without TLS: connections, and answers of the database.
    clear: [u64; 2],
}

impl Phase {
    fn begin(name: &str, up: bool, outside: &Outside) -> Result<Self> {
        Ok(Self {
            name: name.into(),
            begin: Instant::now(),
            up,
            tries: outside.denied.tries(),
            answers: outside.answers()?,
            clear: outside.clear.counts(),
        })
    }
}

fn wait_until_serves(guest: Ipv4Addr) -> Result<()> {
    let served = wait_for(|| match serves_guest(guest) {
        Ok(false) => None,
        found => Some(found),
    });
    served
        .transpose()?
        .map(drop)
        .with_context(|| format!("serve the guest {guest}, which a temporary rule allows"))
}

/// Command that prints the last line of the rules, as this user reads them.
fn rules_as(user: &str) -> String {
    format!("setpriv --reuid={user} --regid={user} --init-groups filter-agent rules 2>&1 | tail -1")
}

struct Scenario {
    kernel: String,
    // Dropped first.
    machine: Machine,
    outside: Outside,
    phase: Phase,
    /// Phases in which a client was answered that must not be.
    answered: Vec<String>,
}

impl Scenario {
    fn live(mut self, streams: Option<&Streams>) -> Result<()> {
        self.wait_until_up()?;
        let kernel = self.machine.command("uname -r")?;
        println!("Linux {kernel} (Debian 12, {} asked for)", self.kernel);
        println!(
            "{:<24}{:>8} {:>16} {:>16} {:>16} {:>12} {:>14} {:>14}",
            "phase",
            "seconds",
            "denied: tries",
            "denied: answers",
            "allowed: served",
            "longest gap",
            "no TLS: tries",
            "no TLS: served"
        );
        let cycles = self
            .machine
            .command("journalctl -b | grep -ci 'ordering cycle'")?;
        ensure!(cycles == "0", "systemd found an ordering cycle");
        for (name, command, up) in PHASES {
            self.begin(name, up)?;
            self.machine.command(command)?;
            let expected = if name == "agent stopped" {
                "inactive"
            } else {
                "active"
            };
            self.wait_for_command(ACTIVE, expected)?;
            self.wait_until_served()?;
        }
        self.machine.command("filter-agent status --verify")?;
        let exposure = self.unit()?;
        self.status_socket()?;
        self.rules_from_etcd()?;
        let guests = self.off_for_two_hours()?;
        self.etcd_comes_back()?;
        self.begin("after the phases", false)?;
        ensure!(
            self.answered.is_empty(),
            "answered although they must not be: {}",
            self.answered.join(", ")
        );
        self.generic()?;
        let enforced_after = self.bond()?;
        let bad_line = self.force_tls_over_a_bad_line()?;
        self.detached_stays_detached()?;
        self.say_why_it_does_not_start()?;
        self.remove_the_package()?;
        let of_deb = self.log_of_dpkg()?;
        let of_rpm = self.rpm()?;
        if let Some(streams) = streams {
            println!("forced TLS: {}", streams.run(&mut self.machine)?);
        }
        self.machine.power_off()?;
        println!("the .deb: {of_deb}");
        println!("the .rpm: {of_rpm}");
        println!("{exposure}");
        println!("{guests}");
        println!("an interface that appears is filtered after {enforced_after} ms");
        println!("over a line that {bad_line}: 10 of 10 connections with TLS, 0 of 10 without");
        Ok(())
    }

    /// Ends the phase with a line about it, and begins the next one.
    fn begin(&mut self, name: &str, up: bool) -> Result<()> {
        let next = Phase::begin(name, up, &self.outside)?;
        let phase = std::mem::replace(&mut self.phase, next);
        let next = &self.phase;
        let (served, gap) = self.outside.allowed.between((phase.begin, next.begin));
        let (tries, answers) = (next.tries - phase.tries, next.answers - phase.answers);
        let seconds = (next.begin - phase.begin).as_secs_f64();
        let gap = if phase.up {
            format!("{:.2} s", gap.as_secs_f64())
        } else {
            "-".into()
        };
        let name = phase.name;
        let [clear, clear_served] = [0, 1].map(|index| next.clear[index] - phase.clear[index]);
        println!(
            "{name:<24}{seconds:>8.1} {tries:>16} {answers:>16} {served:>16} {gap:>12} {clear:>14} \
             {clear_served:>14}"
        );
        // A host that boots for the first time does not know yet which interface the default route
        // will name.
        if answers > 0 && name != "boot" {
            self.answered.push(format!("{name} ({answers} packets)"));
        }
        if clear_served > 0 {
            let text = format!("{name} (without TLS, {clear_served} times)");
            self.answered.push(text);
        }
        Ok(())
    }

    /// Waits until the allowed client is served in a phase in which the database is up.
    fn wait_until_served(&self) -> Result<()> {
        let phase = &self.phase;
        let served = || {
            let span = (phase.begin, Instant::now());
            (!phase.up || self.outside.allowed.between(span).0 > 0).then_some(())
        };
        wait_for(served)
            .with_context(|| format!("serve the allowed client, phase `{}`", phase.name))
    }

    /// Waits until a command prints this.
    fn wait_for_command(&mut self, command: &str, expected: &str) -> Result<()> {
        let mut printed = String::new();
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            printed = self.machine.command(command)?;
            if printed == expected {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(500));
        }
        bail!("`{command}` prints {printed} instead of {expected}")
    }

    /// The fleet's document lets a guest in, and etcd is killed.
    fn rules_from_etcd(&mut self) -> Result<()> {
        self.begin("rules from etcd", true)?;
        let [.., guest] = GUESTS;
        let etcd = Etcd::start(Path::new(FOLDER), true)?;
        let reloaded = self.machine.command(&format!(
            "sed -i -e '/^databases/i fleet: {{endpoints: [\"{}\"], insecure: true, host: db7}}' \\
               -e 's/^    rules:/    fleet: true\\n&/' /etc/filter-agent/policy.yaml
             filter-agent reload 2>&1 && echo reloaded",
            fleet::endpoint()
        ))?;
        ensure!(reloaded.ends_with("reloaded"), "reload says: {reloaded}");
        etcd.put(&format!("rules: [{{cidr: {guest}/32}}]"))?;
        wait_until_serves(guest)?;
        self.wait_until_served()
    }

    /// The host says that etcd is away, and takes the next document once it is back.
    fn etcd_comes_back(&mut self) -> Result<()> {
        self.begin("etcd back", true)?;
        let status = self.machine.command("filter-agent status")?;
        ensure!(
            status.contains("fleet: host db7") && status.contains("etcd does not answer since "),
            "after a boot without etcd the status says: {status}"
        );
        let etcd = Etcd::start(Path::new(FOLDER), false)?;
        etcd.put("rules: []")?;
        let [.., guest] = GUESTS;
        let refused = || match serves_guest(guest) {
            Ok(true) => None,
            found => Some(found),
        };
        wait_for(refused)
            .transpose()?
            .context("refuse the guest whose rule the fleet revoked")?;
        self.wait_until_served()
    }

    /// Of two temporary rules one ends while the machine is off: its source gets no answer from power-on on, the other's
    /// does, and so does the source of the fleet's rule, with etcd away. A policy that is tried then allows the first as well,
    /// and is not enforced after the reboot. Returns a line about it.
    fn off_for_two_hours(&mut self) -> Result<String> {
        self.begin("two guests", true)?;
        let [ending, lasting, of_fleet] = GUESTS;
        for (guest, hours) in [(ending, 1), (lasting, 3)] {
            let allow =
                format!("filter-agent allow orders {guest} --for {hours}h 2>&1 && echo allowed");
            let allowed = self.machine.command(&allow)?;
            ensure!(allowed.ends_with("allowed"), "allow says: {allowed}");
            wait_until_serves(guest)?;
        }
        self.wait_until_served()?;
        let tried = self.machine.command(&format!(
            "cp /etc/filter-agent/policy.yaml /root/policy.yaml
             sed -i 's/rules: \\[/&{{cidr: {ending}\\/32}}, /' /etc/filter-agent/policy.yaml
             filter-agent reload --confirm 5h 2>&1 | tail -2"
        ))?;
        ensure!(tried.contains(" is tried until "), "reload says: {tried}");
        self.begin("off for two hours", false)?;
        self.machine.switch_off_for(2)?;
        let before = self.outside.answers_to_guest()?;
        let ended = Denied::start(ending.into(), database())?;
        wait_until_serves(lasting)?;
        wait_until_serves(of_fleet)?;
        self.wait_until_up()?;
        self.begin("after that", true)?;
        thread::sleep(Duration::from_secs(5));
        self.wait_until_served()?;
        let answers = self.outside.answers_to_guest()? - before;
        ensure!(
            answers == 0,
            "{answers} answers to {ending}, whose rule ended while the machine was off"
        );
        let status = self.machine.command("filter-agent status")?;
        ensure!(status.contains(" fell back at "), "status says: {status}");
        let reloaded = self.machine.command(
            "cp /root/policy.yaml /etc/filter-agent/policy.yaml
             filter-agent reload 2>&1 && echo reloaded",
        )?;
        ensure!(reloaded.ends_with("reloaded"), "reload says: {reloaded}");
        let explained = self.machine.command(&format!(
            "filter-agent explain {lasting} --database orders --json 2>&1"
        ))?;
        let left = serde_json::from_str(&explained)
            .map(|left: serde_json::Value| left["verdicts"][0]["left"].as_u64())
            .ok()
            .flatten()
            .with_context(|| format!("read what is left; explain says: {explained}"))?;
        ensure!(
            (1..=3600).contains(&left),
            "of 3 hours {left} seconds are left after 2"
        );
        Ok(format!(
            "after two hours off, {} tries of a guest whose rule ended got no answer; the other's has {} min left",
            ended.tries(),
            left / 60
        ))
    }

    /// Interfaces that a pattern names are filtered from the reload on; one whose driver refuses native
    /// mode in generic mode.
    fn generic(&mut self) -> Result<()> {
        let reloaded = self.machine.command(
            "sed -i \"s/interfaces: .*/interfaces: [default, '[be]*']/\" /etc/filter-agent/policy.yaml
             filter-agent reload 2>&1 && echo reloaded",
        )?;
        ensure!(reloaded.ends_with("reloaded"), "reload says: {reloaded}");
        // By the fields that the agent gives the journal.
        let refused = self.machine.command(
            "journalctl -b -u filter-agent INTERFACE=eth1 PRIORITY=5 | grep 'attached to eth1'",
        )?;
        ensure!(
            refused.contains("in generic mode, since native mode was refused: "),
            "eth1, whose driver refuses native mode: {refused}"
        );
        let checked = self
            .machine
            .command("filter-agent check --host | grep '^eth1: '")?;
        ensure!(
            checked.starts_with("eth1: virtio_net refuses native XDP"),
            "`check --host` says of eth1: {checked}"
        );
        Ok(())
    }

    /// Returns systemd's assessment of the unit.
    fn unit(&mut self) -> Result<String> {
        let complaints = self.machine.command(
            "systemd-analyze verify --man=no filter-agent.service filter-agent-status.socket",
        )?;
        ensure!(
            complaints.is_empty(),
            "systemd says of the unit: {complaints}"
        );
        let exposure = self
            .machine
            .command("systemd-analyze security filter-agent | tail -1")?;
        // "→ Overall exposure level for filter-agent.service: 2.0 OK 🙂"
        let level = exposure
            .split(": ")
            .nth(1)
            .and_then(|rest| rest.split(' ').next());
        let level: Option<f32> = level.and_then(|level| level.parse().ok());
        ensure!(
            level.is_some_and(|level| level <= EXPOSURE),
            "systemd-analyze says: {exposure}"
        );
        Ok(exposure)
    }

    /// A member of the group reads, another user does not, and without the group the agent runs all the same.
    fn status_socket(&mut self) -> Result<()> {
        self.wait_for_command(SOCKET_ACTIVE, "active")?;
        self.machine
            .command("useradd watcher; useradd stranger; usermod -aG filter-agent watcher")?;
        self.member_reads()?;
        let stranger = self.machine.command(&rules_as("stranger"))?;
        ensure!(
            stranger.contains("members of the group filter-agent"),
            "another user reads: {stranger}"
        );
        self.machine.command("systemctl stop filter-agent")?;
        self.reader_starts_no_agent()?;
        // systemd stops the socket with each of these agents, and starts both again.
        self.machine.command(
            "systemctl start filter-agent
             for i in $(seq 7); do systemctl kill -s KILL filter-agent; sleep 2; done",
        )?;
        self.wait_for_command(ACTIVE, "active")?;
        self.wait_for_command(SOCKET_ACTIVE, "active")?;
        self.member_reads()?;
        self.machine.command(
            "systemctl stop filter-agent
             gpasswd -d watcher filter-agent; groupdel filter-agent; systemctl start filter-agent",
        )?;
        self.wait_for_command(ACTIVE, "active")?;
        self.wait_for_command(SOCKET_ACTIVE, "failed")?;
        self.machine.command(
            "systemd-sysusers filter-agent.conf; systemctl reset-failed; systemctl restart filter-agent",
        )?;
        self.wait_for_command(SOCKET_ACTIVE, "active")?;
        self.wait_for_command(ACTIVE, "active")
    }

    /// A member of the group reads the rules.
    fn member_reads(&mut self) -> Result<()> {
        let member = self.machine.command(&rules_as("watcher"))?;
        ensure!(
            member.starts_with("orders "),
            "a member of the group reads: {member}"
        );
        Ok(())
    }

    /// A reader of the status does not start an agent that has ended.
    fn reader_starts_no_agent(&mut self) -> Result<()> {
        self.wait_for_command(ACTIVE, "inactive")?;
        self.wait_for_command(SOCKET_ACTIVE, "inactive")?;
        let refused = self.machine.command(&rules_as("watcher"))?;
        ensure!(
            refused.contains("no agent answers"),
            "where no agent runs a member reads: {refused}"
        );
        self.machine.command("sleep 2")?;
        self.wait_for_command(ACTIVE, "inactive")
    }

    /// A reader does not attach the filter again that an administrator detached.
    fn detached_stays_detached(&mut self) -> Result<()> {
        let detached = self.machine.command(
            "usermod -aG filter-agent watcher
             filter-agent detach --yes 2>&1 && echo detached",
        )?;
        ensure!(detached.ends_with("detached"), "detach says: {detached}");
        self.reader_starts_no_agent()?;
        self.machine.command("systemctl start filter-agent")?;
        self.wait_for_command(SOCKET_ACTIVE, "active")?;
        self.wait_until_up()
    }

    /// A bond that appears is filtered natively, on the interfaces that join it. Returns how long it
    /// took, in milliseconds.
    fn bond(&mut self) -> Result<String> {
        let enforced_after = self.machine.command(
            "start=$(date +%s%N)
             ip link add bond0 type bond mode active-backup
             until ip link show bond0 | grep -q xdp; do :; done
             echo $((($(date +%s%N) - start) / 1000000))",
        )?;
        self.machine.command(
            "ip netns add outside
             ip link add inner type veth peer name far netns outside
             ip link set inner master bond0
             ip address add 10.88.0.1/24 dev bond0
             ip link set bond0 up
             ip -n outside address add 10.88.0.2/24 dev far
             ip -n outside link set far up",
        )?;
        let mode = "filter-agent status --verify | awk '/^bond0 / {print $2}'";
        self.wait_for_command(mode, "native")?;
        // The link is up and the bond uses it: a port that nothing listens on is refused.
        let closed = "ip netns exec outside timeout 5 bash -c 'exec 3<>/dev/tcp/10.88.0.1/1' 2>&1 \
                      | grep -q refused && echo refused";
        self.wait_for_command(closed, "refused")?;
        let answer = self.connect_over_bond(5)?;
        ensure!(
            answer == "124",
            "over the bond a denied client gets {answer}"
        );
        Ok(enforced_after)
    }

    /// How a connection over the bond ends: 0, or 124 where nothing answers. In front of another number the shell says why.
    fn connect_over_bond(&mut self, seconds: u32) -> Result<String> {
        self.machine.command(&format!(
            "ip netns exec outside timeout {seconds} bash -c 'exec 3<>/dev/tcp/10.88.0.1/{PORT}' 2>&1
             echo $?"
        ))
    }

    /// Forced TLS refuses no psql that speaks it, and serves none that does not, whatever the network
    /// does to their segments. Returns what it did.
    fn force_tls_over_a_bad_line(&mut self) -> Result<String> {
        self.machine.command(
            "sed -i 's/rules: \\[/&{cidr: 10.88.0.2\\/32}, /' /etc/filter-agent/policy.yaml
             sysctl -q net.ipv4.route.min_adv_mss=88
             ip -n outside route change 10.88.0.0/24 dev far advmss 88
             ip route change 10.88.0.0/24 dev bond0 advmss 88
             ip netns exec outside tc qdisc add dev far root netem delay 20ms reorder 40% 50% loss 5%",
        )?;
        let reloaded = self
            .machine
            .command("filter-agent reload 2>&1 && echo reloaded")?;
        ensure!(reloaded.ends_with("reloaded"), "reload says: {reloaded}");
        // Each prints what it said at once: they would write into each other's lines.
        let mut psql = |sslmode: &str, query: &str| {
            self.machine.command(&format!(
                "for i in $(seq 10); do
                     (said=$(ip netns exec outside timeout 600 psql \
                         'host=10.88.0.1 user=postgres dbname=postgres sslmode={sslmode}' \
                         -Atc '{query}' 2>&1); printf '%s\\n' \"$said\") &
                 done
                 wait"
            ))
        };
        let with_tls = psql("require", "select 1")?;
        let served = with_tls.lines().filter(|line| *line == "1").count();
        let without = psql("disable", "select 1")?;
        let refused = without
            .lines()
            .filter(|line| line.contains("error:"))
            .count();
        // MSS 88, of which 12 bytes are the timestamp.
        let size = psql("require", "\\! ss -tinH dst 10.88.0.1")?;
        let lost = self.machine.command(
            "ip netns exec outside tc -s qdisc show dev far | sed -n 's/.*dropped \\([0-9]*\\).*/\\1/p'",
        )?;
        let happened = |count: &str| count.parse().is_ok_and(|count: u32| count > 0);
        let disordered = self
            .machine
            .command("nstat -asz TcpExtTCPOFOQueue | awk '/OFO/ {print $2}'")?;
        ensure!(
            served == 10,
            "over a bad line {served} of 10 are served: {with_tls}"
        );
        ensure!(
            refused == 10,
            "over a bad line {refused} of 10 are refused: {without}"
        );
        ensure!(
            size.contains(" mss:76 ") && happened(&lost) && happened(&disordered),
            "the line is not bad: {size}; {lost} lost, {disordered} out of order"
        );
        self.machine.command(
            "ip netns exec outside tc qdisc delete dev far root
             ip -n outside route change 10.88.0.0/24 dev far
             ip route change 10.88.0.0/24 dev bond0",
        )?;
        Ok(format!(
            "lost {lost} segments and brought {disordered} out of order"
        ))
    }

    /// Removal leaves no trace in the kernel, and purging none on disk.
    fn remove_the_package(&mut self) -> Result<()> {
        // dpkg would ask at an upgrade which policy to keep, and the shipped one opens the databases.
        let asked_about = self
            .machine
            .command("dpkg-query --show --showformat '${Conffiles}' filter-agent | grep policy")?;
        ensure!(
            asked_about.is_empty(),
            "dpkg has the policy as a configuration file: {asked_about}"
        );
        // An agent that hangs keeps nothing in force either.
        let before = self.outside.answers()?;
        let removed = self.machine.command(
            "systemctl kill -s STOP filter-agent
             dpkg -r filter-agent >/tmp/removed 2>&1 && echo removed || cat /tmp/removed",
        )?;
        ensure!(removed == "removed", "dpkg says: {removed}");
        let pins = self
            .machine
            .command("find /sys/fs/bpf/filter-agent 2>/dev/null")?;
        ensure!(
            pins.is_empty(),
            "after its removal the package leaves: {pins}"
        );
        // The kernel frees the links of removed pins a moment later.
        self.wait_for_command("ip link show eth0 | grep -c xdp", "0")?;
        let answered = || {
            let answers = self.outside.answers().unwrap_or(before);
            (answers > before).then_some(())
        };
        wait_for(answered).context("let the denied client in after the package's removal")?;
        // Two hundred connections a second fill the database's queue: another might find no place in two minutes.
        self.outside.denied.stop();
        let answer = self.connect_over_bond(600)?;
        ensure!(answer == "0", "without the package the bond gives {answer}");
        self.machine
            .command("dpkg -P filter-agent >/dev/null 2>&1")?;
        let left = self.machine.command(
            "find /etc/filter-agent /var/lib/filter-agent /usr/sbin/filter-agent 2>/dev/null | wc -l",
        )?;
        ensure!(
            left == "0",
            "{left} files are left after the package was purged"
        );
        Ok(())
    }

    /// `dpkg` says it, and goes on: the filter stays in force.
    fn say_why_it_does_not_start(&mut self) -> Result<()> {
        let drop_in = "/run/systemd/system/filter-agent.service.d";
        let said = self.machine.command(&format!(
            "mkdir -p {drop_in}
             printf '[Service]\\nRestart=no\\nExecStart=\\nExecStart=sh -c \"echo out of order; exit 1\"\\n' >{drop_in}/broken.conf
             dpkg -i /root/next.deb 2>&1 || echo failed
             rm -r {drop_in}; systemctl daemon-reload; systemctl start filter-agent"
        ))?;
        let is_told = said.contains("filter-agent: the service does not start")
            && said.contains("out of order")
            && !said.contains("failed\n");
        ensure!(
            is_told,
            "dpkg says of a service that does not start: {said}"
        );
        self.wait_for_command(ACTIVE, "active")
    }

    /// Checks and returns dpkg's log of the package: its upgrades, downgrade, removal and purge.
    fn log_of_dpkg(&mut self) -> Result<String> {
        let log = self.machine.command(
            "awk '/ filter-agent:/ && $3 ~ /^(upgrade|remove|purge)$/ {print $3, $5, $6}' /var/log/dpkg.log | xargs",
        )?;
        let [this, next] = [1, 2].map(|revision| format!("{}-{revision}", dist::VERSION));
        // Twice upgraded: the second time to a service that does not start.
        let expected = format!(
            "upgrade {this} {next} upgrade {next} {this} upgrade {this} {next} remove {next} <none> purge {next} <none>"
        );
        ensure!(log == expected, "dpkg's log is: {log}");
        Ok(log)
    }

    /// Installs, upgrades, downgrades and removes the .rpm with Debian's rpm. Returns the list of these steps.
    fn rpm(&mut self) -> Result<String> {
        let rpm = "rpm --force-debian --nodeps";
        let expect = |of: &mut Self, what: &str, command: &str, expected: &str| {
            let said = of.machine.command(command)?;
            ensure!(said == expected, "{what}: {said}");
            anyhow::Ok(())
        };
        let policy = policy().replace('\n', "\\n");
        let installed = format!(
            "{rpm} -i /root/this.rpm >/tmp/rpm 2>&1 && printf '{policy}' >/etc/filter-agent/policy.yaml &&
             systemctl is-enabled filter-agent && systemctl start filter-agent >/tmp/rpm 2>&1 || cat /tmp/rpm"
        );
        expect(self, "install the .rpm", &installed, "enabled")?;
        self.wait_until_up()?;
        let pid = "systemctl show --property MainPID --value filter-agent";
        let mut done = String::from("install 1");
        for (what, package, release) in
            [("upgrade", "next.rpm", "2"), ("downgrade", "this.rpm", "1")]
        {
            let before = self.machine.command(pid)?;
            let changed = format!(
                "{rpm} -U --oldpackage /root/{package} >/tmp/rpm 2>&1 &&
                 rpm --query --queryformat '%{{release}}' filter-agent || cat /tmp/rpm"
            );
            expect(self, &format!("{what} the .rpm"), &changed, release)?;
            self.wait_until_up()?;
            ensure!(
                self.machine.command(pid)? != before,
                "the agent of before runs on after the {what} of the .rpm"
            );
            done += &format!(", {what} to {release}");
        }
        let removed =
            format!("{rpm} -e filter-agent >/tmp/rpm 2>&1 && echo removed || cat /tmp/rpm");
        expect(self, "remove the .rpm", &removed, "removed")?;
        let left = "find /sys/fs/bpf/filter-agent /var/lib/filter-agent /etc/filter-agent/* /usr/sbin/filter-agent \
                    /usr/lib/systemd/system/filter-agent* /usr/share/doc/filter-agent /usr/share/filter-agent 2>/dev/null";
        let policy = "/etc/filter-agent/policy.yaml";
        expect(self, "what the .rpm leaves", left, policy)?;
        Ok(done + ", remove")
    }

    /// Until the agent enforces on the interface of the default route and the database answers.
    fn wait_until_up(&mut self) -> Result<()> {
        // The database gives up where address and route take longer to come than its unit waits.
        let up =
            "systemctl is-active --quiet postgresql@15-main || systemctl start postgresql@15-main
                  systemctl is-active --quiet filter-agent && pg_isready -q -h 127.0.0.1 &&
                  ip route | grep -q '^default' && filter-agent status | grep -q '^eth0 .*native' &&
                  echo up";
        let Err(error) = self.wait_for_command(up, "up") else {
            return Ok(());
        };
        let state = self.machine.command(
            "systemctl --failed --no-legend; ip address; ip route; filter-agent status
             journalctl -b -u filter-agent | tail",
        );
        bail!("{error:#}: {}", state.unwrap_or_default())
    }
}
