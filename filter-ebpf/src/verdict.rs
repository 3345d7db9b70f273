// Included by `main` and by `traced`, for the same code in both. Not a module: inlining takes another order then, and
// gives each packet another program than the one that was measured.

#[inline(always)]
fn verdict(ctx: &XdpContext, packet: &Packet) -> u32 {
    match rules::judge(ctx, packet) {
        Outcome::NotConcerned => {
            steps::decided(Decision::NotConcerned, Guard::default(), 0);
            XDP_PASS
        }
        Outcome::LaterFragment => {
            steps::decided(Decision::NotConcerned, Guard::default(), 0);
            XDP_PASS
        }
        Outcome::Allowed { guard, rule, .. } => {
            steps::decided(Decision::Allowed, guard, 0);
            rules::count_hit(guard, rule);
            XDP_PASS
        }
        Outcome::Dropped {
            guard,
            reason,
            sampled,
        } => {
            steps::decided(Decision::Dropped, guard, reason);
            rules::count(guard, reason);
            rules::sample(ctx, packet, guard, reason, Some(sampled));
            if guard.is_monitor() {
                XDP_PASS
            } else {
                XDP_DROP
            }
        }
        // Counted and sampled where it was refused.
        Outcome::Refused { guard, ending } => {
            steps::decided(Decision::Refused, guard, ending as u32);
            match ending {
                _ if guard.is_monitor() => XDP_PASS,
                Ending::Dropped => XDP_DROP,
                Ending::ToClient => XDP_TX,
                Ending::ResetServer => XDP_PASS,
                Ending::Emptied => XDP_PASS,
            }
        }
    }
}
