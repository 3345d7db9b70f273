#!/bin/sh
# Installs filter-agent on a distribution without a package of it: run as root in the unpacked folder.
# `install.sh --remove` takes it away again, and the filter with it; the policy stays.
set -eu

if [ "$(id -u)" != 0 ]; then
    echo "install.sh: run this as root" >&2
    exit 1
fi

here=$(dirname "$0")

if [ "${1-}" = --remove ]; then
    # The service first: an agent that still runs would attach again what is detached below.
    if [ -d /run/systemd/system ]; then
        systemctl disable --now filter-agent.service || true
    fi
    timeout 60 /usr/sbin/filter-agent detach --yes || true
    if [ -n "$(find /sys/fs/bpf/filter-agent -mindepth 1 2>/dev/null)" ]; then
        echo "install.sh: the filter is still pinned below /sys/fs/bpf/filter-agent; run" \
            "\`rm -r /sys/fs/bpf/filter-agent\`, then $0 --remove again" >&2
        exit 1
    fi
    rm -f /usr/sbin/filter-agent /etc/systemd/system/filter-agent.service \
        /etc/systemd/system/filter-agent-status.socket /usr/lib/sysusers.d/filter-agent.conf \
        /usr/share/man/man8/filter-agent.8 /usr/share/man/man5/policy.yaml.5 /usr/share/bash-completion/completions/filter-agent \
        /usr/share/zsh/site-functions/_filter-agent /usr/share/fish/vendor_completions.d/filter-agent.fish
    rm -rf /var/lib/filter-agent
    if [ -d /run/systemd/system ]; then
        systemctl daemon-reload || true
    fi
    echo "removed; /etc/filter-agent/policy.yaml stays"
    exit 0
fi

# A new file takes the old one's place whole: the agent that runs keeps its own.
install -D -m 755 "$here/filter-agent" /usr/sbin/filter-agent.new
mv /usr/sbin/filter-agent.new /usr/sbin/filter-agent
install -D -m 644 "$here/filter-agent.service" /etc/systemd/system/filter-agent.service
install -D -m 644 "$here/filter-agent-status.socket" /etc/systemd/system/filter-agent-status.socket
install -D -m 644 "$here/filter-agent.sysusers" /usr/lib/sysusers.d/filter-agent.conf
systemd-sysusers filter-agent.conf ||
    echo "install.sh: there is no group filter-agent: only root can read the status of the filter" >&2
install -D -m 644 "$here/filter-agent.8" /usr/share/man/man8/filter-agent.8
install -D -m 644 "$here/policy.yaml.5" /usr/share/man/man5/policy.yaml.5
install -D -m 644 "$here/filter-agent.bash" /usr/share/bash-completion/completions/filter-agent
install -D -m 644 "$here/_filter-agent" /usr/share/zsh/site-functions/_filter-agent
install -D -m 644 "$here/filter-agent.fish" /usr/share/fish/vendor_completions.d/filter-agent.fish
if [ ! -e /etc/filter-agent/policy.yaml ]; then
    install -D -m 644 "$here/policy.yaml" /etc/filter-agent/policy.yaml
fi
systemctl daemon-reload
systemctl enable filter-agent.service
systemctl restart filter-agent.service
echo "installed; write /etc/filter-agent/policy.yaml, then: systemctl reload filter-agent"
