# shellcheck shell=bash
# Sourced by the other files here: what this cluster needs (site.sh, or the file that ZEROPREF_SITE names), and modules.
site=${ZEROPREF_SITE:-$ZEROPREF_SLURM/site.sh}
if [ -f "$site" ]; then
    # shellcheck source=/dev/null
    . "$site"
fi
if [ -n "${ZEROPREF_MODULES:-}" ]; then
    # shellcheck disable=SC2086  # words, split on purpose; the container below too
    module load $ZEROPREF_MODULES || exit 1
fi
export ZEROPREF_CONTAINER=${ZEROPREF_CONTAINER:-}
