//! Policy texts for tests.

/// A policy for the interfaces named, with these databases (such as `dedicated` writes).
pub fn policy(interfaces: &str, mode: &str, databases: &[String]) -> String {
    let databases: String = databases.iter().map(|d| format!("  - {d}\n")).collect();
    format!(
        "interfaces: [{interfaces}]
mode: {mode}
regional_network: [10.1.0.0/16, 'fd01::/16']
databases:
{databases}"
    )
}

/// A dedicated database that these prefixes may reach. `more`: other fields of it.
pub fn dedicated(name: &str, port: u16, allowed: &[&str], more: &str) -> String {
    let rules: Vec<String> = allowed.iter().map(|p| format!("{{cidr: '{p}'}}")).collect();
    format!(
        "{{name: {name}, port: {port}, engine: postgresql, model: dedicated, force_tls: false, \
         rules: [{}], {more}}}",
        rules.join(", ")
    )
}
