"""What people see: tables, drawings, traces."""
