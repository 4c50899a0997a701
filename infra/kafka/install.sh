#!/usr/bin/env bash
# The jars of a Kafka broker into the folder that is named, and before it what they need: a JDK 17 and Maven.
# Repeating it is harmless: the folder appears whole or not at all.
set -euo pipefail
folder="${1:?usage: install.sh <folder for the jars>}"
here="$(cd "$(dirname "$0")" && pwd)"

major() { "$1" -version 2>&1 | sed -nE 's/.*version "([0-9]+).*/\1/p' | head -1; }

say() { echo "kafka: $*" >&2; }

if ! command -v java >/dev/null || [ "$(major java)" -lt 17 ] || ! command -v mvn >/dev/null; then
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    say "a JDK of version 17 or later and Maven are needed and not here; install them (on Debian and Ubuntu:"
    say "sudo apt-get install openjdk-17-jdk-headless maven), then run this again"
    exit 1
  fi
  say "installing a JDK 17 and Maven …"
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq openjdk-17-jdk-headless maven; } >&2
fi

[ -d "$folder" ] && exit 0
mkdir -p "$(dirname "$folder")"
part="$(mktemp -d "$folder.XXXXXX")"
trap 'rm -rf "$part"' EXIT
say "copying the broker's jars (55 MB, once) …"
if ! mvn --batch-mode --quiet -f "$here/pom.xml" dependency:copy-dependencies -DincludeScope=runtime \
  -DoutputDirectory="$part" >"$part/maven.log" 2>&1; then
  tail -5 "$part/maven.log" >&2
  say "Maven could not get the jars: see its words above; it needs its package registry, or a mirror in settings.xml"
  exit 1
fi
rm -f "$part/maven.log"
chmod 755 "$part"
mv -T "$part" "$folder" 2>/dev/null || [ -d "$folder" ]
