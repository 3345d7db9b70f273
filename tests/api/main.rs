//! The agent over its sockets: statuses, rules in the provider's shape, and who may ask.

mod document;
mod fuzz;
mod hostile;
mod http;
mod rules;
mod status_socket;
mod statuses;
mod writers;
