#!/usr/bin/env bash
# The sqlite3 shell, attached by URI to whatever is open.
exec 3<&0
. "$(dirname "$0")/line_protocol.sh"

if [ "$KANBANLOCK" ]; then
    serve board.task <<SHELL
-- kanbanlock: load
.load $KANBANLOCK
-- kanbanlock: open
ATTACH 'file:$DATABASE?vfs=kanbanlock' AS board;
-- kanbanlock: end
SHELL
else
    serve board.task <<<"ATTACH '$DATABASE' AS board;"
fi
