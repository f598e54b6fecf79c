-- The role that highwater-agent connects with: it can replicate, and read what every role may read of slots, walsenders
-- and settings; nothing else.
-- Run as a superuser. Choose a password, or drop the clause and use peer or certificate authentication.
CREATE ROLE highwater WITH LOGIN REPLICATION PASSWORD 'change-me';

-- In pg_hba.conf, above the lines for "all" (the first match wins), then SELECT pg_reload_conf(). Replication
-- connections have their own lines; those for SQL serve check, status, the backlog and the room that are left, [outage]
-- give-up and acknowledge = "slot". Beside the server (the operating system's user is "highwater" too; else
-- scram-sha-256 in the place of peer):
--   local      replication  highwater                  peer
--   local      postgres     highwater                  peer
-- From another machine:
--   hostssl    replication  highwater  10.0.0.0/8      scram-sha-256
--   hostssl    postgres     highwater  10.0.0.0/8      scram-sha-256

-- In postgresql.conf (the first three are the defaults of PostgreSQL 14 to 18):
--   wal_level = replica
--   max_wal_senders = 10            # one to stream, two for a base backup, one spare
--   max_replication_slots = 10
--   max_slot_wal_keep_size = ...    # bounds what the slot may hold when no region can be reached for long
