//! Files that change, as programs change them.

use std::{
    fs::{self, File, OpenOptions},
    io::Write as _,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::mpsc,
    time::Duration,
};

use futures_util::{FutureExt as _, Stream, StreamExt as _};
use tempfile::TempDir;

use super::*;
use crate::{region::answer::Answer, threads};

const LIMIT: Duration = Duration::from_secs(10);

struct Setup<S> {
    folder: TempDir,
    watcher: Watcher,
    changed: S,
}

fn setup() -> Setup<impl Stream<Item = PathBuf> + Send + Unpin> {
    let folder = tempfile::tempdir().unwrap();
    let (watcher, changed) = Watcher::new();
    Setup {
        folder,
        watcher,
        changed,
    }
}

impl<S: Stream<Item = PathBuf> + Unpin> Setup<S> {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    /// The prefixes, or the error.
    async fn read(&self, path: &Path) -> Result<Vec<String>, String> {
        match read(path, LIMIT, None, Some(&self.watcher)).await {
            Ok(Answer::Found(found)) => {
                Ok(found.prefixes.iter().map(ToString::to_string).collect())
            }
            Ok(unchanged) => panic!("{unchanged:?}"),
            Err(error) => Err(format!("{error:#}")),
        }
    }

    /// The next announced file; `None`: none is announced of all that happened so far.
    fn announced(&mut self) -> Option<PathBuf> {
        self.watcher.progress(Path::new("/"));
        self.changed.next().now_or_never().flatten()
    }

    /// Changes something; the file must be announced, and then holds the prefix.
    async fn notices(&mut self, file: &Path, prefix: &str, change: impl FnOnce(&Self)) {
        change(self);
        let announced = tokio::time::timeout(LIMIT, self.changed.next()).await;
        assert_eq!(announced.expect(prefix).as_deref(), Some(file), "{prefix}");
        assert_eq!(self.read(file).await, Ok(vec![prefix.to_owned()]));
    }
}

#[tokio::test]
async fn file_that_is_still_being_written_is_not_read() {
    let mut setup = setup();
    let path = setup.path("list");
    setup.write("list", "192.0.2.0/32\n");
    setup.read(&path).await.unwrap();
    for new in [false, true] {
        if new {
            fs::remove_file(&path).unwrap();
        }
        let mut file = File::create(&path).unwrap();
        for i in 0..3 {
            writeln!(file, "192.0.2.{i}/32").unwrap();
            assert_eq!(setup.announced(), None, "new: {new}, line {i}");
            let error = setup.read(&path).await.unwrap_err();
            assert!(error.ends_with("a program is still writing it"), "{error}");
            assert!(error.starts_with(&format!("read {}: ", path.display())));
        }
        drop(file);
        assert_eq!(setup.announced().as_ref(), Some(&path));
        assert_eq!(setup.read(&path).await.unwrap().len(), 3);
    }
    // In place, without cutting it off first.
    let mut file = OpenOptions::new().append(true).open(&path).unwrap();
    writeln!(file, "192.0.2.3/32").unwrap();
    setup.read(&path).await.unwrap_err();
    drop(file);
    assert_eq!(setup.announced(), Some(path.clone()));
    assert_eq!(setup.read(&path).await.unwrap().len(), 4);
}

#[tokio::test]
async fn other_names_announce_nothing() {
    let mut setup = setup();
    let path = setup.path("list");
    setup.write("list", "192.0.2.1/32\n");
    setup.read(&path).await.unwrap();
    setup.write("other", "192.0.2.2/32\n");
    fs::rename(setup.path("other"), setup.path("list.old")).unwrap();
    fs::remove_file(setup.path("list.old")).unwrap();
    fs::read(&path).unwrap();
    assert_eq!(setup.announced(), None);
    setup.write("next", "192.0.2.3/32\n");
    assert_eq!(setup.announced(), None);
    let renamed = |setup: &Setup<_>| fs::rename(setup.path("next"), setup.path("list")).unwrap();
    setup.notices(&path, "192.0.2.3/32", renamed).await;
    fs::remove_file(&path).unwrap();
    assert_eq!(setup.announced(), Some(path));
}

#[tokio::test]
async fn each_hop_of_links_is_watched_in_whatever_directory() {
    let mut setup = setup();
    for directory in ["etc", "srv/releases/1", "srv/releases/2", "run"] {
        fs::create_dir_all(setup.path(directory)).unwrap();
    }
    setup.write("srv/releases/1/list", "192.0.2.1/32\n");
    setup.write("srv/releases/2/list", "192.0.2.2/32\n");
    // etc/list -> run/hop -> srv/current/list, and srv/current -> releases/1.
    symlink("releases/1", setup.path("srv/current")).unwrap();
    symlink(setup.path("srv/current/list"), setup.path("run/hop")).unwrap();
    symlink("../run/hop", setup.path("etc/list")).unwrap();
    let path = setup.path("etc/list");
    assert_eq!(setup.read(&path).await.unwrap(), ["192.0.2.1/32"]);

    let swap = |target: &'static str, link: &'static str| {
        move |setup: &Setup<_>| {
            symlink(target, setup.path("new")).unwrap();
            fs::rename(setup.path("new"), setup.path(link)).unwrap();
        }
    };
    // The link to a directory.
    setup
        .notices(&path, "192.0.2.2/32", swap("releases/2", "srv/current"))
        .await;
    // The file behind all of them.
    let written = |setup: &Setup<_>| setup.write("srv/releases/2/list", "192.0.2.3/32\n");
    setup.notices(&path, "192.0.2.3/32", written).await;
    // The hop in the third directory.
    let hop = swap("../srv/releases/1/list", "run/hop");
    setup.notices(&path, "192.0.2.1/32", hop).await;
    // A directory above the target.
    fs::create_dir_all(setup.path("other/releases/1")).unwrap();
    setup.write("other/releases/1/list", "192.0.2.4/32\n");
    fs::rename(setup.path("srv"), setup.path("gone")).unwrap();
    assert_eq!(setup.announced().as_ref(), Some(&path));
    assert!(setup.read(&path).await.is_err());
    let renamed = |setup: &Setup<_>| fs::rename(setup.path("other"), setup.path("srv")).unwrap();
    setup.notices(&path, "192.0.2.4/32", renamed).await;
    // What is no longer on the way is watched no longer.
    fs::write(setup.path("gone/releases/2/list"), "192.0.2.5/32\n").unwrap();
    assert_eq!(setup.announced(), None);
}

#[tokio::test]
async fn missing_directories_are_noticed_when_they_appear() {
    let mut setup = setup();
    let path = setup.path("a/b/list");
    setup.read(&path).await.unwrap_err();
    fs::create_dir_all(setup.path("a/b")).unwrap();
    assert_eq!(setup.announced().as_ref(), Some(&path));
    setup.read(&path).await.unwrap_err();
    let written = |setup: &Setup<_>| setup.write("a/b/list", "192.0.2.1/32\n");
    setup.notices(&path, "192.0.2.1/32", written).await;
}

#[tokio::test]
async fn files_that_are_no_longer_wanted_are_not_announced() {
    let mut setup = setup();
    let paths = [setup.path("a"), setup.path("b")];
    for path in &paths {
        fs::write(path, "192.0.2.1/32\n").unwrap();
        setup.read(path).await.unwrap();
    }
    setup.watcher.keep_only(|path| path == paths[1]);
    fs::write(&paths[0], "192.0.2.2/32\n").unwrap();
    assert_eq!(setup.announced(), None);
    fs::write(&paths[1], "192.0.2.2/32\n").unwrap();
    assert_eq!(setup.announced().as_ref(), Some(&paths[1]));
}

#[tokio::test]
async fn file_that_gives_no_answer_is_given_up_and_named() {
    let setup = setup();
    setup.write("list", "192.0.2.1/32\n");
    let path = setup.path("list");
    let (release, wait) = mpsc::channel::<()>();
    // Stands for a read that a file system does not end.
    let hung = threads::run(&threads::REGION_FILES, &path, move || {
        Ok(wait.recv().is_ok())
    });
    let limit = Duration::from_secs(1);
    let (_, answer) = futures_util::future::join(
        tokio::time::timeout(limit, hung),
        read(&path, limit, None, Some(&setup.watcher)),
    )
    .await;
    let expected = format!("read {}: no answer within 1s", path.display());
    assert_eq!(format!("{:#}", answer.unwrap_err()), expected);
    release.send(()).unwrap();
    assert_eq!(setup.read(&path).await.unwrap(), ["192.0.2.1/32"]);
}

#[tokio::test]
async fn pipes_and_devices_are_refused() {
    let setup = setup();
    let error = setup.read(Path::new("/dev/zero")).await.unwrap_err();
    assert_eq!(error, "read /dev/zero: it is not a regular file");
}

/// truncate(2) is announced as a write, and nobody closes the file after it: the region was unfinished for ever.
#[tokio::test]
async fn file_that_is_truncated_from_outside_is_read_again() {
    let setup = setup();
    let path = setup.path("list");
    setup.write("list", "192.0.2.1/32\n192.0.2.2/32\n");
    setup.read(&path).await.unwrap();
    nix::unistd::truncate(&path, 13).unwrap();
    assert_eq!(setup.read(&path).await, Ok(vec!["192.0.2.1/32".into()]));
    // While a program has it open, it is not: that one may write on.
    let writer = OpenOptions::new().append(true).open(&path).unwrap();
    nix::unistd::truncate(&path, 13).unwrap();
    setup.write("other", "");
    nix::unistd::truncate(&path, 0).unwrap();
    let error = setup.read(&path).await.unwrap_err();
    assert!(error.ends_with("a program is still writing it"), "{error}");
    drop(writer);
    assert_eq!(setup.read(&path).await, Ok(Vec::new()));
}

/// No event is reported of writes before the first watch: at a start half of a file was taken.
#[tokio::test]
async fn file_that_was_being_written_before_it_is_watched_is_not_read() {
    let mut setup = setup();
    let path = setup.path("list");
    let mut file = File::create(&path).unwrap();
    writeln!(file, "192.0.2.1/32").unwrap();
    for _ in 0..2 {
        let error = read(&path, LIMIT, None, Some(&setup.watcher)).await;
        let error = error.unwrap_err();
        assert!(error.is::<StillWritten>(), "{error:#}");
        assert_eq!(setup.announced(), None);
    }
    writeln!(file, "192.0.2.2/32").unwrap();
    drop(file);
    assert_eq!(setup.announced().as_ref(), Some(&path));
    assert_eq!(setup.read(&path).await.unwrap().len(), 2);
    // A program that opens a file which is watched, and writes nothing, keeps nobody from reading it.
    let _idle = OpenOptions::new().append(true).open(&path).unwrap();
    assert_eq!(setup.read(&path).await.unwrap().len(), 2);
}
