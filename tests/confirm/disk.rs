//! A full disk, and one that hangs.

use std::{
    fs::{self, File},
    io::Write as _,
    path::PathBuf,
};

use filter_tests::{
    mounts::Mounted,
    net::{Net, wait_until},
};
use nix::mount::{MsFlags, mount, umount};

use crate::host::{
    PORT, after, assert_abandoned, assert_allowed, before, confirmed_text, enforcing, kept,
    try_policy, wait_for_fall_back,
};

/// A state directory with little room.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn new(net: &Net) -> Self {
        let path = net.state_dir();
        fs::create_dir_all(&path).unwrap();
        let (kind, size) = (Some("tmpfs"), Some("size=128k"));
        mount(kind, &path, kind, MsFlags::empty(), size).unwrap();
        Self(path)
    }

    fn fill(&self) {
        let mut filler = File::create(self.0.join("filler")).unwrap();
        while filler.write(&[0; 4096]).is_ok() {}
    }

    fn make_room(&self) {
        fs::remove_file(self.0.join("filler")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = umount(&self.0);
    }
}

#[test]
fn full_disk_refuses_what_it_cannot_keep_and_keeps_nothing_from_falling_back() {
    let mut net = Net::new("confirm-disk");
    let disk = SmallDisk::new(&net);
    let _echo = net.echo(PORT);
    net.write_policy(&before());
    net.start();
    net.wait_until_confirmed();
    net.write_policy(&after());
    disk.fill();
    let error = net.agent_error(&["reload", "--confirm", "10m"]);
    assert!(
        error.contains("nothing is changed") && error.contains("No space left"),
        "{error}"
    );
    assert_allowed(&net, true, false);
    disk.make_room();
    let id = try_policy(&net, &after(), "10m");
    disk.fill();
    let error = net.agent_error(&["confirm"]);
    assert!(
        error.contains("not confirmed") && error.contains("No space left"),
        "{error}"
    );
    assert_allowed(&net, false, true);
    assert_eq!(net.agent_json(&["status"])["window"]["id"], id);
    assert_eq!(confirmed_text(&net), before());
    // What was abandoned is not on disk, but the window is: the next start falls back, too.
    let decided = net.agent_json(&["confirm", "--fall-back"]);
    let errors = decided["errors"].to_string();
    assert!(errors.contains("No space left"), "{errors}");
    assert_allowed(&net, true, false);
    let status = net.agent_json(&["status"]);
    assert!(
        status["warnings"].to_string().contains("is not kept"),
        "{status}"
    );
    disk.make_room();
    assert!(wait_until(|| kept(&net)["open"].is_null()));
    net.kill();
    net.start();
    assert_allowed(&net, true, false);
    assert_abandoned(&net, "was taken back");
    net.terminate();
    drop(disk);
}

#[test]
fn disk_that_hangs_refuses_the_reload_and_holds_up_nothing_else() {
    let mut net = enforcing("confirm-hang");
    let _echo = net.echo(PORT);
    net.write_policy(&after());
    let place = net.state_dir();
    let hanging = Mounted::hanging(&place);
    let error = net.agent_error(&["reload", "--confirm", "10m"]);
    assert!(error.contains("the disk takes too long"), "{error}");
    assert_allowed(&net, true, false);
    drop(hanging);
    try_policy(&net, &after(), "2s");
    wait_for_fall_back(&net);
    assert_allowed(&net, true, false);
    net.terminate();
}
