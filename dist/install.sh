#!/bin/sh
# Installs filter-agent on a distribution without a package of it: run as root in the unpacked folder.
# `install.sh --remove` takes it away again, and the filter with it; the policy stays.
set -eu

refuse() {
    echo "install.sh: $1" >&2
    exit 1
}

case "${1-}" in
'' | --remove) ;;
*) refuse "$1 is unknown: run it without an argument to install, or with --remove" ;;
esac
[ "$(id -u)" = 0 ] || refuse "run this as root"

is_pinned() {
    [ -n "$(find /sys/fs/bpf/filter-agent -mindepth 1 2>/dev/null)" ]
}

# An upgrade or a removal of the package would replace or delete files of this installation, and a purge the policy and the
# state, even of a package that is already removed.
keep="copy /etc/filter-agent and /var/lib/filter-agent"
again="which detaches the filter of an installed package, put the copies back, then run this again"
if command -v dpkg-query >/dev/null; then
    state=$(dpkg-query --show --showformat '${db:Status-Status}' filter-agent 2>/dev/null) || [ $? = 1 ] ||
        refuse "dpkg-query fails, so that a package of filter-agent may be here: run \`dpkg-query --show filter-agent\`"
    case "$state" in
    '' | not-installed) ;;
    *) refuse "dpkg has a package filter-agent ($state): use that, or $keep, run \`dpkg --purge filter-agent\`, $again" ;;
    esac
fi
if command -v rpm >/dev/null && rpm --query --quiet filter-agent; then
    refuse "rpm has a package filter-agent: use that, or $keep, run \`rpm --erase filter-agent\`, $again"
fi

here=$(dirname "$0")
units=/usr/lib/systemd/system
documents=/usr/share/doc/filter-agent

# Version 0.1.0 installed its unit among those of administrators, where it takes precedence over the new one.
remove_unit_of_0_1_0() {
    old=/etc/systemd/system/filter-agent.service
    hash=e0684656408976c3a9580940664925b0665e8c7febbc5bba32e0462422eb1f95
    [ -f "$old" ] || return 0
    if [ "$(sha256sum <"$old")" = "$hash  -" ]; then
        rm "$old"
    else
        echo "install.sh: $old was changed on this host, and stays, in place of $units/filter-agent.service:" \
            "remove it where nothing in it is needed" >&2
    fi
}

if [ "${1-}" = --remove ]; then
    # The service first: an agent that still runs would attach again what is detached below.
    if [ -d /run/systemd/system ]; then
        systemctl stop filter-agent.service || true
    fi
    timeout 60 /usr/sbin/filter-agent detach --yes || true
    if is_pinned; then
        refuse "the filter is still pinned below /sys/fs/bpf/filter-agent: run \`systemctl stop filter-agent; rm -r /sys/fs/bpf/filter-agent\`, then $0 --remove again"
    fi
    systemctl disable filter-agent.service || true
    remove_unit_of_0_1_0
    rm -f /usr/sbin/filter-agent "$units/filter-agent.service" "$units/filter-agent-status.socket" \
        /usr/lib/sysusers.d/filter-agent.conf /usr/share/man/man8/filter-agent.8 /usr/share/man/man5/policy.yaml.5 \
        /usr/share/bash-completion/completions/filter-agent /usr/share/zsh/site-functions/_filter-agent \
        /usr/share/fish/vendor_completions.d/filter-agent.fish
    rm -rf "$documents" /usr/share/filter-agent
    rm -rf /var/lib/filter-agent || echo "install.sh: something is left of /var/lib/filter-agent" >&2
    if [ -d /run/systemd/system ]; then
        systemctl daemon-reload || true
    fi
    echo "removed; /etc/filter-agent stays"
    exit 0
fi

is_first=yes
[ ! -e /usr/sbin/filter-agent ] || is_first=
# A new file takes the old one's place whole: the agent that runs keeps its own.
install -D -m 755 "$here/filter-agent" /usr/sbin/filter-agent.new
mv /usr/sbin/filter-agent.new /usr/sbin/filter-agent
# Places file...: installs the file that lies here as each of these.
place() {
    for file in "$@"; do
        install -D -m 644 "$here/$(basename "$file")" "$file"
    done
}
install -D -m 644 "$here/etc-readme" /etc/filter-agent/README || true
place "$units/filter-agent.service" "$units/filter-agent-status.socket" \
    /usr/share/man/man8/filter-agent.8 /usr/share/man/man5/policy.yaml.5 \
    /usr/share/zsh/site-functions/_filter-agent /usr/share/fish/vendor_completions.d/filter-agent.fish \
    /usr/share/filter-agent/policy.yaml /usr/share/filter-agent/alerts.yaml /usr/share/filter-agent/dashboard.json \
    "$documents/README.md" "$documents/CHANGELOG.md" \
    "$documents/LICENSE-MIT" "$documents/LICENSE-APACHE" "$documents/LICENSE-GPL2" \
    "$documents/licences.gz" "$documents/filter-agent.cdx.json.gz" \
    "$documents/examples/database-needs-filter.conf"
for file in "$here"/docs/*; do
    install -D -m 644 "$file" "$documents/docs/$(basename "$file")"
done
install -D -m 644 "$here/filter-agent.bash" /usr/share/bash-completion/completions/filter-agent
install -D -m 644 "$here/filter-agent.sysusers" /usr/lib/sysusers.d/filter-agent.conf
systemd-sysusers filter-agent.conf ||
    echo "install.sh: there is no group filter-agent: only root can read the status of the filter" >&2
policy=/etc/filter-agent/policy.yaml
# The shipped policy guards nothing: an upgrade that copied it to a host whose policy is lost would open the databases.
if [ -n "$is_first" ] && [ ! -e "$policy" ] && [ ! -h "$policy" ] && ! is_pinned; then
    place "$policy" || echo "install.sh: $policy is missing, and cannot be written: the service needs one" >&2
fi
remove_unit_of_0_1_0
# By force: the link that enabled the unit of 0.1.0 leads to the former path.
systemctl enable --force filter-agent.service
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload
    systemctl restart filter-agent.service
fi
echo "installed; write $policy, then: systemctl reload filter-agent"
