//! Reads and writes many entries of a map in one call: aya has no such calls.

use std::{
    io,
    marker::PhantomData,
    mem::MaybeUninit,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    ptr,
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{Pod, maps::Map};
use nix::{
    errno::Errno,
    libc::{SYS_bpf, c_long, syscall},
};

/// Entries that are written in one call. A call that fails is done again entry by entry, and a lock is held for one entry at a time.
pub(super) const BATCH: usize = 1 << 10;

/// Entries that are read in one call: a long array takes few.
const READ: usize = 1 << 14;

const MAP_LOOKUP_BATCH: c_long = 24;
const MAP_UPDATE_BATCH: c_long = 26;
const MAP_DELETE_BATCH: c_long = 27;

/// The part of `union bpf_attr` for these calls. The kernel takes what is beyond it as zeros.
#[derive(Default)]
#[repr(C)]
struct Attributes {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// An array or a trie, by a file descriptor of its own.
pub(super) struct Batches<K, V> {
    fd: OwnedFd,
    most: usize,
    entries: PhantomData<(K, V)>,
}

impl<K: Pod, V: Pod> Batches<K, V> {
    /// # Errors
    /// A map of another kind, or whose entries have other sizes.
    pub(super) fn open(map: &Map) -> Result<Self> {
        // A hash goes on from a place that is no key, and a per-CPU map has values of another size.
        let (Map::Array(map) | Map::LpmTrie(map)) = map else {
            bail!("a map is neither an array nor a trie");
        };
        let info = map.info().context("read the properties of a map")?;
        let sizes = (info.key_size() as usize, info.value_size() as usize);
        ensure!(
            sizes == (size_of::<K>(), size_of::<V>()),
            "a map has entries of other sizes than are read and written"
        );
        let fd = map.fd().as_fd().try_clone_to_owned();
        Ok(Self {
            fd: fd.context("copy the descriptor of a map")?,
            most: info.max_entries() as usize,
            entries: PhantomData,
        })
    }

    /// Writes entries.
    ///
    /// # Errors
    /// Any of them may be written: which, the kernel does not say in every case, and a kernel without
    /// such calls fails them as well. Where the entries are written again one by one, their errors are the ones that count.
    pub(super) fn update(&self, keys: &[K], values: &[V]) -> io::Result<()> {
        assert_eq!(keys.len(), values.len(), "each key has a value");
        self.write(MAP_UPDATE_BATCH, keys, values.as_ptr().cast())
    }

    /// Removes entries.
    ///
    /// # Errors
    /// As `update`, and where an entry is not there.
    pub(super) fn delete(&self, keys: &[K]) -> io::Result<()> {
        self.write(MAP_DELETE_BATCH, keys, ptr::null())
    }

    fn write(&self, command: c_long, keys: &[K], values: *const ()) -> io::Result<()> {
        let mut attributes = Attributes {
            keys: address(keys.as_ptr()),
            values: address(values),
            count: keys.len() as u32,
            ..self.attributes()
        };
        // SAFETY: the kernel reads `count` keys and, unless they are removed, as many values, in the sizes that `open`
        // compared, from memory that both slices hold until the call returns. It writes to `count` only.
        unsafe { call(command, &mut attributes) }
    }

    /// Reads all entries, in the map's own order. While others write to the map, entries that they leave alone may be
    /// missing or come twice.
    ///
    /// # Errors
    /// A call fails, as in `update`, or there are more entries than the map can hold: the kernel begins again where the
    /// entry that it read last is gone.
    pub(super) fn read(&self) -> io::Result<(Vec<K>, Vec<V>)> {
        let (mut keys, mut values) = (Vec::<K>::new(), Vec::<V>::new());
        let mut place = MaybeUninit::<K>::uninit();
        let mut after = ptr::null();
        loop {
            keys.reserve(READ);
            values.reserve(READ);
            let mut attributes = Attributes {
                in_batch: address(after),
                out_batch: address(place.as_mut_ptr()),
                keys: address(keys.spare_capacity_mut().as_mut_ptr()),
                values: address(values.spare_capacity_mut().as_mut_ptr()),
                count: READ as u32,
                ..self.attributes()
            };
            // SAFETY: both vectors have room for `count` more entries of the sizes that `open` compared, and `place` for
            // a key, which is how arrays and tries say where to go on. `after` is null, or `place`, which an earlier
            // call has written: the kernel reads it before it writes there.
            let result = unsafe { call(MAP_LOOKUP_BATCH, &mut attributes) };
            let is_end = match result {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                result => result.is_err(),
            };
            let count = attributes.count as usize;
            // The kernel ends with fewer than were asked for, and says so. Who answers in its place has written nothing.
            if count > READ || is_end != (count < READ) || keys.len() + count > self.most {
                return Err(io::Error::other(
                    "the kernel lists other entries than there can be",
                ));
            }
            // SAFETY: the kernel has written `count` keys and values behind those that were there, and any bytes are a
            // valid `Pod`.
            unsafe {
                keys.set_len(keys.len() + count);
                values.set_len(values.len() + count);
            }
            if is_end {
                return Ok((keys, values));
            }
            after = place.as_ptr();
        }
    }

    fn attributes(&self) -> Attributes {
        Attributes {
            map_fd: self.fd.as_raw_fd() as u32,
            ..Attributes::default()
        }
    }
}

fn address<T>(pointer: *const T) -> u64 {
    pointer.expose_provenance() as u64
}

/// # Safety
/// The attributes must point to memory that the command may use until it returns.
unsafe fn call(command: c_long, attributes: &mut Attributes) -> io::Result<()> {
    let size = size_of::<Attributes>();
    // SAFETY: the kernel reads and writes `size` bytes at most of the attributes, and the caller vouches for what they
    // point to.
    let result = unsafe { syscall(SYS_bpf, command, ptr::from_mut(attributes), size) };
    Ok(Errno::result(result).map(drop)?)
}
