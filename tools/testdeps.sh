#!/usr/bin/env bash
# Installs what the tests need beside Go, where it is missing: through apt-get as root, else it names the packages and
# fails. No service is left running: the tests start their own, on their own ports.
set -euo pipefail

missing=()
need() { # package, then commands or files of which one suffices
  local package=$1 candidate
  shift
  for candidate in "$@"; do
    case $candidate in
      /*) compgen -G "$candidate" >/dev/null && return ;;
      *) command -v "$candidate" >/dev/null && return ;;
    esac
  done
  missing+=("$package")
}

# Debian keeps some of these in sbin, which is not on every PATH.
PATH=$PATH:/usr/sbin:/sbin
need nginx nginx
need postgresql '/usr/lib/postgresql/*/bin/initdb' initdb
need openssl openssl
need curl curl
need git git
need gcc gcc cc
# The race detector links with the C library.
need libc6-dev /usr/include/stdlib.h /usr/include/*-linux-gnu/stdlib.h

if [ ${#missing[@]} -eq 0 ]; then
  exit 0
fi
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
  echo "the tests need these Debian packages, or their like: ${missing[*]}" >&2
  echo "install them (as root: apt-get install ${missing[*]}) and try again" >&2
  exit 1
fi
echo "installing for the tests: ${missing[*]}"
# RUNLEVEL=1 keeps the packages from starting their services.
export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
apt-get update -q
apt-get install -q -y --no-install-recommends "${missing[@]}"
