-- The role that highwater-agent connects with: it can replicate and read which slots exist, nothing else.
-- Run as a superuser. Choose a password, or drop the clause and use peer or certificate authentication.
CREATE ROLE highwater WITH LOGIN REPLICATION PASSWORD 'change-me';

-- Lets `check` and `status` see every walsender and setting. Leave it out and they report "unknown" instead.
GRANT pg_monitor TO highwater;

-- In pg_hba.conf (replication connections have their own lines), then SELECT pg_reload_conf():
--   local      replication  highwater                  peer map=highwater     (or scram-sha-256)
--   hostssl    replication  highwater  10.0.0.0/8      scram-sha-256
--   local      postgres     highwater                  peer map=highwater     (only for check and status)

-- In postgresql.conf (the first three are the defaults of PostgreSQL 14 to 18):
--   wal_level = replica
--   max_wal_senders = 10            -- one to stream, one per base backup, one spare
--   max_replication_slots = 10
--   max_slot_wal_keep_size = ...    -- bounds what the slot may hold when no region can be reached for long
