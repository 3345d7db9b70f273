//! The value that a trie has for a prefix, and that the verdict cache has for a source.

use crate::Reason;

/// Not the value of any prefix: no rule allows the source.
pub const NO_RULE: u32 = u32::MAX;

/// As `NO_RULE`, for a source that no host may have on the wire.
pub const BAD_SOURCE: u32 = u32::MAX - 1;

/// The rule that decides on the sources of a prefix, and the rule whose end is the end of that. One word, which the
/// packet path compares with few constants:
///
/// | value | sources |
/// | --- | --- |
/// | below `FIRST_WITH_END` | are allowed |
/// | below `FIRST_BLOCKED` | are allowed until the end |
/// | below `BAD_SOURCE` | are blocked until the end |
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct RuleValue(pub u32);

impl RuleValue {
    const ID: u32 = 0x7fff;
    const EXEMPT: u32 = 1 << 15;
    /// Zero where the value has no end, else one more than the id of the rule whose end counts.
    const END_SHIFT: u32 = 16;
    const END: u32 = 0x7fff << Self::END_SHIFT;
    const BLOCKED: u32 = 1 << 31;

    pub const FIRST_WITH_END: u32 = 1 << Self::END_SHIFT;
    pub const FIRST_BLOCKED: u32 = Self::BLOCKED;

    /// The value for sources that a rule allows.
    pub const fn allowed(rule: u32) -> Self {
        Self(rule & Self::ID)
    }

    /// The value for sources that a block holds, which always has an end.
    pub const fn blocked(block: u32) -> Self {
        Self(block & Self::ID | Self::BLOCKED)
    }

    /// The same value, where TLS is not forced on the sources.
    pub const fn exempt(self) -> Self {
        Self(self.0 | Self::EXEMPT)
    }

    /// The same value until the end of a rule.
    pub const fn until_end_of(self, rule: u32) -> Self {
        Self(self.0 & !Self::END | (rule + 1) << Self::END_SHIFT)
    }

    /// The id of the rule that decides.
    pub const fn rule(self) -> u32 {
        self.0 & Self::ID
    }

    /// Whether TLS is not forced on the sources.
    pub const fn is_exempt(self) -> bool {
        self.0 & Self::EXEMPT != 0
    }

    /// The number of the `Reason` why sources of a value that does not allow them are dropped.
    pub const fn reason(self) -> u32 {
        // `NO_RULE`, `BAD_SOURCE`, and blocks: by a minimum, which is one path for the verifier.
        let above = !self.0;
        let most = Reason::Blocked as u32 - Reason::NotAllowed as u32;
        Reason::NotAllowed as u32 + if above < most { above } else { most }
    }

    /// The id of the rule whose end counts.
    pub const fn end(self) -> Option<u32> {
        (self.0 >> Self::END_SHIFT & Self::ID).checked_sub(1)
    }
}

impl core::fmt::Debug for RuleValue {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let kind = match self.0 {
            NO_RULE => return f.write_str("no rule"),
            BAD_SOURCE => return f.write_str("bad source"),
            Self::FIRST_BLOCKED.. => "blocked by",
            _ if self.is_exempt() => "exempt by",
            _ => "allowed by",
        };
        write!(f, "{kind} {}", self.rule())?;
        match self.end() {
            Some(rule) => write!(f, " until the end of {rule}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RULE_IDS;

    #[test]
    fn values_of_every_rule_lie_where_the_packet_path_expects_them() {
        assert_eq!(RuleValue(NO_RULE).reason(), Reason::NotAllowed as u32);
        assert_eq!(RuleValue(BAD_SOURCE).reason(), Reason::BadSource as u32);
        for rule in [0, 1, RULE_IDS / 2, RULE_IDS - 1] {
            for end in [0, 1, RULE_IDS - 1] {
                let allowed = RuleValue::allowed(rule);
                let exempt = allowed.exempt();
                assert!(exempt.0 < RuleValue::FIRST_WITH_END && allowed.end().is_none());
                let ending = exempt.until_end_of(end);
                assert!((RuleValue::FIRST_WITH_END..RuleValue::FIRST_BLOCKED).contains(&ending.0));
                let blocked = RuleValue::blocked(rule).until_end_of(end);
                assert!((RuleValue::FIRST_BLOCKED..BAD_SOURCE).contains(&blocked.0));
                for value in [ending, blocked] {
                    assert_eq!((value.rule(), value.end()), (rule, Some(end)));
                }
                assert_eq!(blocked.reason(), Reason::Blocked as u32);
                assert!(ending.is_exempt() && !blocked.is_exempt() && !allowed.is_exempt());
            }
        }
    }
}
