//! Executes a translated program on a frame and counts. What it does not know it refuses: a count that may be wrong is
//! none. Memory is its own; elements of maps are copied into it when they are first used.

use std::{collections::HashMap, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use nix::time::{ClockId, clock_gettime};

use super::maps::Maps;

/// An address: what kind of place it is in 16 bits that no number is likely to have, which one of them in as many, and in the
/// lower half how far into it.
const KIND: u64 = 0xffff << 48;
/// Bytes of this machine.
const AREA: u64 = 0xa5e1 << 48;
/// The kernel's map, and its element of a hash. All that a program does with their addresses is to add what is in front of the
/// values, which differs between kernels: the sum is where the values begin.
const MAP: u64 = 0xa5e2 << 48;
const ELEMENT: u64 = 0xa5e3 << 48;
/// The values of an array, one behind the other; of a per-CPU array, a pointer to each.
const VALUES: u64 = 0xa5e4 << 48;
/// The XDP context, and the kernel's structures that it points to.
const CONTEXT: u64 = 0xa5e5 << 48;

const PACKET: u64 = AREA;
const STACK: u64 = AREA | 1 << 32;
/// Size of a function's stack, in bytes, and the deepest nesting of calls.
const FRAME: u64 = 512;
const DEPTH: u64 = 8;
/// A verified program ends before.
const MOST: u64 = 1_000_000;
/// Where test runs come in, by the index of the interface.
const LOOPBACK: u64 = 1;

#[derive(Clone, Copy, Debug)]
pub struct Instruction {
    code: u8,
    to: usize,
    from: usize,
    offset: i16,
    immediate: i32,
}

impl Instruction {
    pub fn read(&[code, registers, o0, o1, i0, i1, i2, i3]: &[u8; 8]) -> Self {
        Self {
            code,
            to: usize::from(registers & 0xf),
            from: usize::from(registers >> 4),
            offset: i16::from_ne_bytes([o0, o1]),
            immediate: i32::from_ne_bytes([i0, i1, i2, i3]),
        }
    }
}

/// What came of it.
#[derive(Debug, PartialEq)]
pub struct Ran {
    pub returned: u32,
    pub executed: u64,
}

pub struct Machine<'a> {
    program: &'a [Instruction],
    helpers: &'a HashMap<i32, String>,
    maps: Maps,
    registers: [u64; 11],
    areas: Vec<Vec<u8>>,
    /// Addresses of elements that were looked up, or zero, by map and key.
    elements: HashMap<(u16, Vec<u8>), u64>,
    /// Where callers go on, and their registers from r6 on.
    callers: Vec<(usize, [u64; 5])>,
}

impl<'a> Machine<'a> {
    pub fn new(program: &'a [Instruction], helpers: &'a HashMap<i32, String>, maps: Maps) -> Self {
        Self {
            program,
            helpers,
            maps,
            registers: [0; 11],
            areas: Vec::new(),
            elements: HashMap::new(),
            callers: Vec::new(),
        }
    }

    pub fn run(mut self, frame: &[u8]) -> Result<Ran> {
        self.areas = vec![frame.to_vec(), vec![0; (DEPTH * FRAME) as usize]];
        self.registers[1] = CONTEXT;
        self.registers[10] = STACK + FRAME;
        let mut at = 0;
        for executed in 1..=MOST {
            let instruction = *self.program.get(at).context("run past the program")?;
            let next = self
                .step(at, instruction)
                .with_context(|| format!("execute instruction {at}, {instruction:x?}"))?;
            match next {
                Some(next) => at = next,
                None => {
                    let returned = self.registers[0] as u32;
                    return Ok(Ran { returned, executed });
                }
            }
        }
        bail!("the program does not end")
    }

    /// Executes one. Returns where the program goes on; it ends where it does not.
    fn step(&mut self, at: usize, instruction: Instruction) -> Result<Option<usize>> {
        #[rustfmt::skip]
        let Instruction { code, to, from, offset, immediate } = instruction;
        let (class, operation) = (code & 7, code & 0xf0);
        let size = [4, 2, 1, 8][usize::from(code >> 3 & 3)];
        let by = |distance: i64| Some((at as i64 + 1 + distance) as usize);
        let operand = match code & 8 {
            0 => i64::from(immediate) as u64,
            _ => self.registers[from],
        };
        let place = |register: u64| register.wrapping_add_signed(offset.into());
        match class {
            0 if code == 0x18 => {
                let high = self.program.get(at + 1).context("find its other half")?;
                let (low, high) = (u64::from(immediate as u32), high.immediate as u32);
                // With the map's id in place of its address: the kernel shows no addresses.
                self.registers[to] = match from {
                    0 => u64::from(high) << 32 | low,
                    1 => MAP | u64::from(self.maps.open(low as u32)?) << 32,
                    2 => VALUES | u64::from(self.maps.open(low as u32)?) << 32 | u64::from(high),
                    _ => bail!("it loads what is not known here"),
                };
                return Ok(by(1));
            }
            1 if code >> 5 == 3 => {
                self.registers[to] = self.load(place(self.registers[from]), size)?;
            }
            // Of an immediate value, of a register, and atomic.
            2 | 3 if code >> 5 == 3 => {
                let value = match class {
                    2 => i64::from(immediate) as u64,
                    _ => self.registers[from],
                };
                self.store(place(self.registers[to]), size, value)?;
            }
            3 if code >> 5 == 6 && immediate & 0xe == 0 => {
                let place = place(self.registers[to]);
                let before = self.load(place, size)?;
                let after = calculate((immediate & 0xf0) as u8, size == 8, before, operand)?;
                self.store(place, size, after)?;
                if immediate & 1 != 0 {
                    self.registers[from] = before;
                }
            }
            4 | 7 => {
                let before = self.registers[to];
                let is_wide = class == 7;
                self.registers[to] = match (operation, offset) {
                    (0, 0) if code == 0x07 && before & KIND == MAP => before ^ MAP ^ VALUES,
                    (0, 0) if code == 0x07 && before & KIND == ELEMENT => before ^ ELEMENT ^ AREA,
                    (0xb0, 0) if is_wide => operand,
                    (0xb0, 0) => u64::from(operand as u32),
                    // A pointer to this processor's value, where one to all of them was. Here it was this one's.
                    (0xb0, -1) if is_wide => operand,
                    // To big-endian, on little-endian machines, or turned on all.
                    (0xd0, 0) if is_wide || code & 8 != 0 => match immediate {
                        16 => u64::from((before as u16).swap_bytes()),
                        32 => u64::from((before as u32).swap_bytes()),
                        _ => before.swap_bytes(),
                    },
                    (operation, 0) => calculate(operation, is_wide, before, operand)?,
                    _ => bail!("it is not known here"),
                };
            }
            5 if code == 0x85 && from == 0 => self.help(immediate)?,
            5 if code == 0x85 && from == 1 => {
                let depth = self.callers.len() as u64 + 1;
                ensure!(depth < DEPTH, "calls are too deep");
                let [.., r6, r7, r8, r9, r10] = self.registers;
                self.callers.push((at + 1, [r6, r7, r8, r9, r10]));
                self.registers[10] += FRAME;
                return Ok(by(offset.into()));
            }
            5 if code == 0x95 => {
                let Some((next, saved)) = self.callers.pop() else {
                    return Ok(None);
                };
                self.registers[6..].copy_from_slice(&saved);
                return Ok(Some(next));
            }
            5 if code == 0x05 => return Ok(by(offset.into())),
            6 if code == 0x06 => return Ok(by(immediate.into())),
            5 | 6 => {
                if holds(operation, class == 5, self.registers[to], operand)? {
                    return Ok(by(offset.into()));
                }
            }
            _ => bail!("it is not known here"),
        }
        Ok(by(0))
    }

    fn load(&mut self, address: u64, size: usize) -> Result<u64> {
        match (address & KIND, address as u32, size) {
            // struct xdp_buff: data and data_end come first.
            (CONTEXT, 0, 8) => return Ok(PACKET),
            (CONTEXT, 8, 8) => return Ok(PACKET + self.areas[0].len() as u64),
            // Its queue, and the queue's interface, wherever the kernel has them: of those, the program reads one number.
            (CONTEXT, _, 8) => return Ok(CONTEXT | 1 << 16),
            (CONTEXT, 0x1_0000.., 4) => return Ok(LOOPBACK),
            // Whether an LRU hash has seen it used: it has, by the runs before.
            (ELEMENT, _, 1) => return Ok(1),
            (VALUES, offset, 8) if self.maps.map(number(address))?.is_per_cpu => {
                return self.element(number(address), &(offset / 8).to_ne_bytes());
            }
            _ => {}
        }
        let mut value = [0; 8];
        value[..size].copy_from_slice(self.bytes(address, size)?);
        Ok(u64::from_le_bytes(value))
    }

    fn store(&mut self, address: u64, size: usize, value: u64) -> Result<()> {
        let bytes = self.bytes(address, size)?;
        bytes.copy_from_slice(&value.to_le_bytes()[..size]);
        Ok(())
    }

    fn bytes(&mut self, mut address: u64, size: usize) -> Result<&mut [u8]> {
        if address & KIND == VALUES {
            let map = self.maps.map(number(address))?;
            ensure!(!map.is_per_cpu, "it has a pointer changed");
            let (stride, offset) = (map.stride as u32, address as u32);
            let element = self.element(number(address), &(offset / stride).to_ne_bytes())?;
            ensure!(element != 0, "an array has no such element");
            address = element + u64::from(offset % stride);
        }
        ensure!(address & KIND == AREA, "{address:#x} is no place of memory");
        let area = self.areas.get_mut(usize::from(number(address)));
        let offset = address as u32 as usize;
        area.and_then(|area| area.get_mut(offset..offset + size))
            .with_context(|| format!("{size} bytes at {address:#x} are out of bounds"))
    }

    /// The address of a value, or zero. What the machine has changed of it stays so.
    fn element(&mut self, map: u16, key: &[u8]) -> Result<u64> {
        let name = (map, key.to_owned());
        if let Some(&address) = self.elements.get(&name) {
            return Ok(address);
        }
        let address = match self.maps.look_up(map, key)? {
            Some(value) => {
                self.areas.push(value);
                AREA | u64::from(u16::try_from(self.areas.len() - 1)?) << 32
            }
            None => 0,
        };
        self.elements.insert(name, address);
        Ok(address)
    }

    /// The element of the map in r1 for the key that r2 points to.
    fn look_up(&mut self) -> Result<u64> {
        let [_, map, key, ..] = self.registers;
        ensure!(map & KIND == MAP, "r1 is no map");
        let size = self.maps.map(number(map))?.key_size;
        let key = self.bytes(key, size)?.to_vec();
        self.element(number(map), &key)
    }

    /// The result of a helper of the kernel. A helper that would change a map leaves it as it is here.
    fn help(&mut self, function: i32) -> Result<()> {
        const NOT_FOUND: u64 = -2_i64 as u64;
        const EXISTS: u64 = -17_i64 as u64;
        const NOEXIST: u64 = 1;
        let name = self.helpers.get(&function).context("find its helper")?;
        let [_, _, offset, buffer, length, ..] = self.registers;
        self.registers[0] = match name.as_str() {
            "trie_lookup_elem" => self.look_up()?,
            "__htab_map_lookup_elem" => match self.look_up()? {
                0 => 0,
                value => value ^ AREA ^ ELEMENT,
            },
            "htab_lru_map_update_elem" if length == NOEXIST && self.look_up()? != 0 => EXISTS,
            "htab_lru_map_delete_elem" if self.look_up()? == 0 => NOT_FOUND,
            "htab_lru_map_update_elem" | "htab_lru_map_delete_elem" => 0,
            "bpf_ktime_get_boot_ns" => {
                Duration::from(clock_gettime(ClockId::CLOCK_BOOTTIME)?).as_nanos() as u64
            }
            "bpf_xdp_get_buff_len" => self.areas[0].len() as u64,
            "bpf_xdp_load_bytes" => {
                let size = length as u32 as usize;
                let bytes = self
                    .bytes(PACKET + u64::from(offset as u32), size)?
                    .to_vec();
                self.bytes(buffer, size)?.copy_from_slice(&bytes);
                0
            }
            name => bail!("the helper {name} is not known here"),
        };
        Ok(())
    }
}

/// Which map or area.
const fn number(address: u64) -> u16 {
    (address >> 32) as u16
}

fn calculate(operation: u8, is_wide: bool, a: u64, b: u64) -> Result<u64> {
    let (a, b, bits) = match is_wide {
        true => (a, b, 64),
        false => (u64::from(a as u32), u64::from(b as u32), 32),
    };
    let shift = (b as u32) % bits;
    let result = match operation {
        0x00 => a.wrapping_add(b),
        0x10 => a.wrapping_sub(b),
        0x20 => a.wrapping_mul(b),
        0x30 => a.checked_div(b).unwrap_or(0),
        0x40 => a | b,
        0x50 => a & b,
        0x60 => a << shift,
        0x70 => a >> shift,
        0x80 => a.wrapping_neg(),
        0x90 => a.checked_rem(b).unwrap_or(a),
        0xa0 => a ^ b,
        0xc0 if is_wide => (a as i64 >> shift) as u64,
        0xc0 => (a as i32 >> shift) as u64,
        _ => bail!("its operation is not known here"),
    };
    Ok(if is_wide {
        result
    } else {
        result & 0xffff_ffff
    })
}

fn holds(operation: u8, is_wide: bool, a: u64, b: u64) -> Result<bool> {
    // In the upper half, the lower ones compare alike, signed or not.
    let shift = if is_wide { 0 } else { 32 };
    let (a, b) = (a << shift, b << shift);
    let (signed_a, signed_b) = (a as i64, b as i64);
    Ok(match operation {
        0x10 => a == b,
        0x20 => a > b,
        0x30 => a >= b,
        0x40 => a & b != 0,
        0x50 => a != b,
        0x60 => signed_a > signed_b,
        0x70 => signed_a >= signed_b,
        0xa0 => a < b,
        0xb0 => a <= b,
        0xc0 => signed_a < signed_b,
        0xd0 => signed_a <= signed_b,
        _ => bail!("its condition is not known here"),
    })
}
