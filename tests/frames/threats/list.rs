//! Collects plans, and numbers their packets.

use crate::frames::{
    addressing::Addressing,
    packet::{Packet, Piece},
    plan::{Plan, plan},
};

pub(super) struct Threats<'a> {
    pub(super) addressing: &'a Addressing,
    pub(super) first_id: u32,
    pub(super) plans: Vec<Plan>,
}

impl Threats<'_> {
    /// The packet that the next plan is made of.
    pub(super) fn next(&self) -> Packet {
        Packet::new(self.addressing, self.first_id + self.plans.len() as u32)
    }

    pub(super) fn frame(&mut self, name: impl Into<String>, frame: Vec<u8>) {
        self.plans.push(plan(name, vec![frame]));
    }

    pub(super) fn pieces(&mut self, name: impl Into<String>, packet: &Packet, pieces: &[Piece]) {
        self.plans.push(plan(name, packet.fragments(pieces)));
    }
}
