//! The machine that counts, on programs of known counts.

#[path = "machine.rs"]
mod machine;
#[path = "maps.rs"]
mod maps;

use std::collections::HashMap;

use machine::{Instruction, Machine, Ran};
use maps::Maps;

/// Code, registers (the upper half is read), offset, immediate value.
type Words = (u8, u8, i16, i32);

const EXIT: Words = (0x95, 0, 0, 0);

fn run(program: &[Words], frame: &[u8]) -> anyhow::Result<Ran> {
    let program = program.iter().map(|&(code, registers, offset, immediate)| {
        let ([o0, o1], [i0, i1, i2, i3]) = (offset.to_ne_bytes(), immediate.to_ne_bytes());
        Instruction::read(&[code, registers, o0, o1, i0, i1, i2, i3])
    });
    let program: Vec<Instruction> = program.collect();
    let helpers = HashMap::from([(7, "bpf_xdp_get_buff_len".to_owned())]);
    Machine::new(&program, &helpers, Maps::new(0)).run(frame)
}

fn ran(returned: u32, executed: u64) -> Ran {
    Ran { returned, executed }
}

#[test]
fn every_executed_instruction_counts_once_and_a_wide_constant_as_one() {
    // r0 = 0x2_0000_0001; r0 >>= 33; exit
    let constant = [(0x18, 0, 0, 1), (0, 0, 0, 2), (0x77, 0, 0, 33), EXIT];
    assert_eq!(run(&constant, &[]).unwrap(), ran(1, 3));
    // r0 = 0; r2 = 5; do { r0 += r2; r2 -= 1 } while r2 != 0
    let sum = [
        (0xb7, 0, 0, 0),
        (0xb7, 2, 0, 5),
        (0x0f, 0x20, 0, 0),
        (0x07, 2, 0, -1),
        (0x55, 2, -3, 0),
        EXIT,
    ];
    assert_eq!(run(&sum, &[]).unwrap(), ran(15, 2 + 5 * 3 + 1));
}

#[test]
fn packets_are_read_between_their_bounds_only() {
    // r2 = data; r3 = data_end; r0 = 1; r4 = r2 + 14; if r4 > r3 { exit }; r0 = be16(r2[12]); exit
    let ethertype = [
        (0x79, 0x12, 0, 0),
        (0x79, 0x13, 8, 0),
        (0xb7, 0, 0, 1),
        (0xbf, 0x24, 0, 0),
        (0x07, 4, 0, 14),
        (0x2d, 0x34, 2, 0),
        (0x69, 0x20, 12, 0),
        (0xdc, 0, 0, 16),
        EXIT,
    ];
    let mut frame = [0; 14];
    frame[12..].copy_from_slice(&[0x86, 0xdd]);
    assert_eq!(run(&ethertype, &frame).unwrap(), ran(0x86dd, 9));
    assert_eq!(run(&ethertype, &frame[..13]).unwrap(), ran(1, 7));
    let unchecked = [ethertype[0], ethertype[6], EXIT];
    run(&unchecked, &frame[..13]).unwrap_err();
}

#[test]
fn a_function_has_its_own_stack_and_gives_its_callers_registers_back() {
    // r6 = 40; [r10 - 8] = 2; call +3; r0 = [r10 - 8] + r6; exit
    // r6 = 9; [r10 - 8] = r6; r0 = 0; exit
    let calls = [
        (0xb7, 6, 0, 40),
        (0x7a, 10, -8, 2),
        (0x85, 0x10, 3, 0),
        (0x79, 0xa0, -8, 0),
        (0x0f, 0x60, 0, 0),
        EXIT,
        (0xb7, 6, 0, 9),
        (0x7b, 0x6a, -8, 0),
        (0xb7, 0, 0, 0),
        EXIT,
    ];
    assert_eq!(run(&calls, &[]).unwrap(), ran(42, 10));
}

#[test]
fn arithmetic_and_conditions_of_both_widths_are_those_of_the_kernel() {
    // The operation on -6 and 4; then whether -6 is below 4.
    for (code, expected) in [
        (0x07, -2_i64),
        (0x17, -10),
        (0x27, -24),
        (0x37, (1 << 62) - 2),
        (0x47, -2),
        (0x57, 0),
        (0x67, -96),
        (0x77, (u64::MAX >> 4) as i64),
        (0x87, 6),
        (0x97, 2),
        (0xa7, -2),
        (0xb7, 4),
        (0xc7, -1),
        (0x04, 0xffff_fffe),
        (0x34, 0x3fff_fffe),
        (0x74, 0x0fff_ffff),
        (0xb4, 4),
        (0xc4, 0xffff_ffff),
    ] {
        for (half, shift) in [(expected as u32, 0), ((expected >> 32) as u32, 32)] {
            let program = [(0xb7, 0, 0, -6), (code, 0, 0, 4), (0x77, 0, 0, shift), EXIT];
            assert_eq!(run(&program, &[]).unwrap(), ran(half, 4), "{code:#x}");
        }
    }
    for (code, holds) in [
        (0x15, false),
        (0x25, true),
        (0x35, true),
        (0x45, false),
        (0x55, true),
        (0x65, false),
        (0x75, false),
        (0xa5, false),
        (0xb5, false),
        (0xc5, true),
        (0xd5, true),
        (0x26, true),
        (0xc6, true),
    ] {
        let program = [
            (0xb7, 0, 0, -6),
            (code, 0, 1, 4),
            EXIT,
            (0xb7, 0, 0, 1),
            EXIT,
        ];
        let expected = if holds {
            ran(1, 4)
        } else {
            ran(-6_i32 as u32, 3)
        };
        assert_eq!(run(&program, &[]).unwrap(), expected, "{code:#x}");
    }
}

#[test]
fn atomic_addition_changes_memory_and_returns_what_was_there() {
    // [r10 - 8] = 30; r0 = 4; r0 = fetch_add [r10 - 8], r0; r2 = [r10 - 8]; r0 += r2; exit
    let add = [
        (0x7a, 10, -8, 30),
        (0xb7, 0, 0, 4),
        (0xdb, 0x0a, -8, 1),
        (0x79, 0xa2, -8, 0),
        (0x0f, 0x20, 0, 0),
        EXIT,
    ];
    assert_eq!(run(&add, &[]).unwrap(), ran(30 + 34, 6));
}

#[test]
fn a_helper_answers_and_counts_as_its_call() {
    assert_eq!(run(&[(0x85, 0, 0, 7), EXIT], &[0; 60]).unwrap(), ran(60, 2));
}

#[test]
fn what_is_not_known_is_refused() {
    for (program, what) in [
        // A helper without a name here, a kernel function, an atomic exchange, signed division, no instruction.
        ((0x85, 0, 0, 8), "helper"),
        ((0x85, 0x20, 0, 7), "condition"),
        ((0xdb, 0x0a, -8, 0xe1), "not known"),
        ((0x37, 0, 1, 2), "not known"),
        ((0xe7, 0, 0, 0), "operation"),
        ((0x05, 0, 7, 0), "past the program"),
        ((0x05, 0, -1, 0), "does not end"),
    ] {
        let error = run(&[program, EXIT], &[]).unwrap_err();
        assert!(format!("{error:#}").contains(what), "{error:#}");
    }
}
