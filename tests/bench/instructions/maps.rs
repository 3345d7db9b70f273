//! The program's maps, read as the program itself would.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _},
};

use anyhow::{Context as _, Result, ensure};
use aya::{
    maps::{MapData, MapType},
    util::nr_cpus,
};
use nix::{
    errno::Errno,
    libc::{SYS_bpf, c_long, syscall},
};

pub struct Maps {
    processor: usize,
    maps: Vec<Map>,
}

pub struct Map {
    id: u32,
    data: MapData,
    pub is_per_cpu: bool,
    pub key_size: usize,
    /// As values lie behind each other, in memory and in what the kernel returns of a per-CPU map.
    pub stride: usize,
}

impl Maps {
    /// `processor`: whose values of per-CPU maps are read.
    pub fn new(processor: usize) -> Self {
        let maps = Vec::new();
        Self { processor, maps }
    }

    /// The number by which it is called here.
    pub fn open(&mut self, id: u32) -> Result<u16> {
        let place = self.maps.iter().position(|map| map.id == id);
        let place = place.unwrap_or(self.maps.len());
        if place == self.maps.len() {
            let map = Map::open(id).with_context(|| format!("open the map {id}"))?;
            self.maps.push(map);
        }
        Ok(place.try_into()?)
    }

    pub fn map(&self, number: u16) -> Result<&Map> {
        let map = self.maps.get(usize::from(number));
        map.context("find the map of an address")
    }

    pub fn look_up(&self, number: u16, key: &[u8]) -> Result<Option<Vec<u8>>> {
        let map = self.map(number)?;
        let value = map.look_up(key);
        let value = value.with_context(|| format!("look up in the map {}", map.id))?;
        Ok(value.map(|mut value| {
            if map.is_per_cpu {
                value.drain(..self.processor * map.stride);
            }
            value.truncate(map.stride);
            value
        }))
    }
}

/// `union bpf_attr` for a look-up.
#[repr(C)]
struct Attributes {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

const MAP_LOOKUP: c_long = 1;

impl Map {
    fn open(id: u32) -> Result<Self> {
        let data = MapData::from_id(id)?;
        let info = data.info()?;
        Ok(Self {
            id,
            is_per_cpu: info.map_type()? == MapType::PerCpuArray,
            key_size: info.key_size() as usize,
            stride: (info.value_size() as usize).next_multiple_of(8),
            data,
        })
    }

    fn look_up(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        ensure!(key.len() == self.key_size, "the key has another size");
        let processors = nr_cpus().map_err(|(_, error)| error)?;
        let mut value = vec![0_u8; processors * self.stride];
        let mut attributes = Attributes {
            map: self.data.fd().as_fd().as_raw_fd() as u32,
            padding: 0,
            key: key.as_ptr().expose_provenance() as u64,
            value: value.as_mut_ptr().expose_provenance() as u64,
            flags: 0,
        };
        let size = size_of::<Attributes>();
        // SAFETY: the kernel reads a key of the size compared above, and writes a value, or one for each possible processor,
        // padded to 8 bytes: `value` has room for them. Both are there until the call returns.
        let result = unsafe { syscall(SYS_bpf, MAP_LOOKUP, &raw mut attributes, size) };
        match Errno::result(result).map_err(io::Error::from) {
            Ok(_) => Ok(Some(value)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}
