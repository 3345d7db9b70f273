//! The agent, from a policy file to entries in the kernel. See `docs/ARCHITECTURE.md`.
