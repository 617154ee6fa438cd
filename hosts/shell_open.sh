#!/usr/bin/env bash
# The sqlite3 shell, opened by URI.
exec 3<&0
. "$(dirname "$0")/line_protocol.sh"

if [ "$KANBANLOCK" ]; then
    serve task <<SHELL
-- kanbanlock: load
.load $KANBANLOCK
-- kanbanlock: open
.open 'file:$DATABASE?vfs=kanbanlock'
-- kanbanlock: end
SHELL
else
    serve task <<<".open '$DATABASE'"
fi
