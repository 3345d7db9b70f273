//! The way to a file: each name that the kernel looks up, symbolic links followed.

use std::{
    collections::VecDeque,
    ffi::OsString,
    fs, io,
    path::{Component, Path, PathBuf},
};

/// Symbolic links followed on the way to one file, as many as the kernel follows.
const MAX_LINKS: usize = 40;

/// A walk to a file, name by name.
pub struct Walk {
    /// Without symbolic links.
    directory: PathBuf,
    rest: VecDeque<OsString>,
    links: usize,
}

/// A name on the way, in a directory whose path holds no symbolic links.
pub struct Name {
    pub directory: PathBuf,
    pub name: OsString,
    /// Whether the file itself has this name, or a link in its place.
    pub is_last: bool,
}

impl Walk {
    /// Begins at the root. `path` must be absolute.
    pub fn new(path: &Path) -> Self {
        Self {
            directory: "/".into(),
            rest: names(path).into(),
            links: 0,
        }
    }

    /// The next name, not looked at yet.
    pub fn next_name(&mut self) -> Option<Name> {
        loop {
            let name = self.rest.pop_front()?;
            if name != ".." {
                return Some(Name {
                    directory: self.directory.clone(),
                    name,
                    is_last: self.rest.is_empty(),
                });
            }
            self.directory.pop();
        }
    }

    /// Goes through the last name. Returns whether it is a symbolic link.
    ///
    /// # Errors
    /// Nothing has the name, or that cannot be found out: the walk ends.
    pub fn follow(&mut self, last: &Name) -> io::Result<bool> {
        let place = last.directory.join(&last.name);
        let target = match fs::read_link(&place) {
            Ok(target) => target,
            // Not a symbolic link.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                self.directory = place;
                return Ok(false);
            }
            Err(error) => {
                self.rest.clear();
                return Err(error);
            }
        };
        self.links += 1;
        if self.links > MAX_LINKS {
            self.rest.clear();
            return Ok(true);
        }
        if target.is_absolute() {
            self.directory = "/".into();
        }
        for name in names(&target).into_iter().rev() {
            self.rest.push_front(name);
        }
        Ok(true)
    }
}

fn names(path: &Path) -> Vec<OsString> {
    let names = path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    });
    names.collect()
}
