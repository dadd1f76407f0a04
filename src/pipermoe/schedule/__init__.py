"""Pipeline schedules as data: who builds them, checks them, times them and reads them."""
